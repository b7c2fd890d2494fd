"""Trainings as people start them, and what pre-flight has to say of each.

A case is a folder (trainer_folder.py), what is changed in it, and options behind those of a recipe.
sd-scripts' own train() is asked whether it trains (toy_training.py), pre-flight what it says, and
test_real_cases.py compares the two. `fails` means an error, `warns` a warning, because
something else is trained than was meant, and `trains` that pre-flight says nothing new. The second
text of the first two is a pattern that has to be in the sentence. `truth` is what the trainer
itself shows of the training.

What cannot be asked on a CPU, or not without a network, is not here: fp16, two GPUs, bitsandbytes,
DeepSpeed, Hugging Face, and diffusers folders, which are read whole. Nor are the launchers, which
begin before the trainer.
"""

from __future__ import annotations

from trainer_case import CLASSIC, CONTENT_STYLE, fails, trains, warns
from trainer_folder import (
    CHECKPOINT,
    CONFIG,
    IMAGES,
    PROJECT,
    UNET,
    add,
    animated,
    caption,
    captions,
    checkpoint,
    config,
    config_as_json,
    crlf,
    cut_hole,
    distilled,
    encode,
    folder,
    inpainting,
    leftover_cache,
    link,
    move,
    only_pictures,
    picture,
    remove,
    rename_captions,
    sample_config,
    sd15,
    sideways,
    subset,
    truncate,
    with_tensors,
    without,
    write,
)

# ---- As it is ------------------------------------------------------------------------------------

RECIPES = [
    trains("the fast recipe", truth={"modules": CONTENT_STYLE, "sizes": [[64, 64]], "scale": 1.0}),
    trains("the classic recipe", recipe=CLASSIC, truth={"modules": CONTENT_STYLE}),
    # The recipes' own 32; every other case has 64.
    trains("buckets in steps of 32", "--bucket_reso_steps=32", before_0_10="bucket_reso_steps"),
    trains("the sample config", change=sample_config),
]

# ---- The dataset config --------------------------------------------------------------------------

CONFIGS = [
    trains("a config with CRLF", change=crlf(CONFIG)),
    fails("a config with a byte order mark", "config.toml", change=encode("utf-8-sig")),
    fails("a config in UTF-16", "config.toml", change=encode("utf-16")),
    trains(
        "a config in JSON",
        f"--dataset_config={PROJECT}/config.json",
        change=config_as_json,
    ),
    fails(
        "a config in YAML",
        "config.yaml",
        f"--dataset_config={PROJECT}/config.yaml",
        change=write(f"{PROJECT}/config.yaml", "datasets: []\n"),
    ),
    fails("no config", "config.toml", change=remove(CONFIG)),
    fails("a config that is no TOML", "config.toml", change=config("[[datasets]]", "[[datasets]")),
    fails("a config of nothing", "config.toml", change=write(CONFIG, "")),
    fails("one table of datasets", "datasets", change=config("[[datasets]]", "[datasets]")),
    fails("an unknown key", "num_repeat", change=config("num_repeats", "num_repeat")),
    fails("batch_size in a subset", "batch_size", change=add("batch_size = 1\n")),
    fails("resolution in a subset", "resolution", change=add("resolution = 64\n")),
    fails(
        "image_dir in [general]",
        "image_dir",
        change=config("[general]", f'[general]\nimage_dir = "{IMAGES}"'),
    ),
    trains(
        "num_repeats in a dataset",
        change=(
            config("  num_repeats = 2", ""),
            config("batch_size", "num_repeats = 3\nbatch_size"),
        ),
    ),
    fails("a resolution in quotes", "resolution", change=config("= 64", '= "64,64"')),
    trains("a resolution of two", change=config("= 64", "= [64, 64]")),
    fails("half a repeat", "num_repeats", change=config("num_repeats = 2", "num_repeats = 1.5")),
    fails("no repeats", "no picture", change=config("num_repeats = 2", "num_repeats = 0")),
    fails("a subset without image_dir", "image_dir", change=config("image_dir", "# image_dir")),
    fails("true in quotes", "flip_aug", change=add('flip_aug = "true"\n')),
    fails(
        "a resolution above max_bucket_reso",
        "max_bucket_reso",
        change=config("= 64", "= 128\nmax_bucket_reso = 64"),
    ),
    fails(
        "buckets smaller than their step",
        "bucket_reso",
        change=config("batch_size", "max_bucket_reso = 32\nmin_bucket_reso = 32\nbatch_size"),
    ),
    fails("a resolution below min_bucket_reso", "min_bucket_reso", "--min_bucket_reso=128"),
    fails("bucket steps of 48", "bucket_reso_steps", "--bucket_reso_steps=48"),
    fails("a batch of none", "batch_size", change=config("batch_size = 1", "batch_size = 0")),
    trains("a batch of two", change=config("batch_size = 1", "batch_size = 2")),
    trains("no buckets", change=config("batch_size", "enable_bucket = false\nbatch_size")),
    warns(
        "options that the config overrides",
        "resolution.*batch_size|batch_size.*resolution|config",
        "--resolution=768",
        "--train_batch_size=4",
        truth={"sizes": [[64, 64]]},
    ),
    warns(
        "a folder of pictures beside a config",
        "train_data_dir",
        f"--train_data_dir={PROJECT}",
    ),
    fails("two words for a resolution", "64", "--resolution=64", "64"),
]

# ---- Folders of pictures -------------------------------------------------------------------------

FOLDERS = [
    fails("a folder that is not there", "images", change=move(IMAGES, f"{PROJECT}/pictures")),
    fails("backslashes in quotes", "config.toml", change=config(IMAGES, IMAGES.replace("/", "\\"))),
    fails("an empty folder", "no picture", change=remove(f"{IMAGES}/*")),
    trains(
        "a folder with a space",
        change=(move(IMAGES, f"{PROJECT}/my images"), config("demo/images", "demo/my images")),
    ),
    trains(
        "a folder with brackets",
        change=(move(IMAGES, f"{PROJECT}/[v] é"), config("demo/images", "demo/[v] é")),
    ),
    warns(
        "a config that names another project's folder",
        "other",
        change=(
            move(IMAGES, "_in/lora/sdxl/other/images"),
            write("_in/lora/sdxl/other/config.toml", ""),
            config("demo", "other"),
        ),
    ),
    warns("a second folder that is not there", "gone", change=subset("gone")),
    warns(
        "a second folder without pictures", "nothing", change=(folder("nothing"), subset("nothing"))
    ),
    warns("the same folder twice", "images", change=subset(IMAGES)),
    warns(
        "a second folder with no repeats",
        "num_repeats|other",
        change=(picture("../other/0.png"), subset(f"{PROJECT}/other", "num_repeats = 0")),
    ),
    trains(
        "a second folder",
        change=(
            picture("../other/0.png"),
            write(f"{PROJECT}/other/0.txt", "a dog"),
            subset(f"{PROJECT}/other"),
        ),
    ),
    warns(
        "regularization pictures without a weight",
        "prior_loss_weight",
        "--max_train_steps=16",
        change=(
            picture("../reg/0.png"),
            write(f"{PROJECT}/reg/0.txt", "a dog"),
            subset(f"{PROJECT}/reg", "is_reg = true"),
        ),
        truth={"idle": True},
    ),
    trains(
        "regularization pictures with a weight",
        "--prior_loss_weight=1",
        change=(
            picture("../reg/0.png"),
            write(f"{PROJECT}/reg/0.txt", "a dog"),
            subset(f"{PROJECT}/reg", "is_reg = true"),
        ),
    ),
    trains(
        "folders as the GUI names them",
        f"--train_data_dir={PROJECT}/train",
        less=("dataset_config",),
        change=move(IMAGES, f"{PROJECT}/train/10_sks dog"),
    ),
    fails(
        "a folder without repeats in its name",
        "train",
        f"--train_data_dir={PROJECT}/train",
        less=("dataset_config",),
        change=move(IMAGES, f"{PROJECT}/train/dog"),
    ),
]

# ---- Pictures ------------------------------------------------------------------------------------

ODD_PICTURES = {
    "CMYK": ("004.jpg", (64, 64), "CMYK"),
    "16 bits": ("004.png", (64, 64), "I;16"),
    "grey": ("004.png", (64, 64), "L"),
    "palette": ("004.png", (64, 64), "P"),
    "alpha": ("004.png", (64, 64), "RGBA"),
    "two pixels": ("004.png", (2, 2), "RGB"),
    "long": ("004.png", (640, 64), "RGB"),
    "odd sizes": ("004.webp", (131, 97), "RGB"),
    "another format than its ending's": ("004.png", (64, 64), "RGB", "JPEG"),
    "a space in its name": ("my picture.png", (64, 64), "RGB"),
}
BROKEN = {
    "cut off": ("000.png", truncate(f"{IMAGES}/000.png")),
    "empty": ("000.png", write(f"{IMAGES}/000.png", b"")),
    "a page in HTML": ("004.jpg", write(f"{IMAGES}/004.jpg", b"<html></html>")),
    "a folder": ("004.png", folder(f"{IMAGES}/004.png")),
    "a link to nothing": ("004.png", link(f"{IMAGES}/004.png", "gone.png")),
}
PICTURES = [
    *(
        warns(
            f"a picture of the ending {ending}",
            rf"\{ending}",
            change=write(f"{IMAGES}/004{ending}", b"\xff\xd8"),
        )
        for ending in (".jfif", ".gif", ".heic", ".avif", ".Png")
    ),
    fails("pictures of the ending .gif alone", "no picture", change=only_pictures(".gif")),
    fails(
        "pictures one folder below",
        "no picture",
        change=(move(IMAGES, f"{PROJECT}/below"), move(f"{PROJECT}/below", f"{IMAGES}/below")),
    ),
    trains("files of macOS", change=write(f"{IMAGES}/._000.png", b"\x00\x05\x16\x07")),
    warns(
        "a photo stored sideways",
        "EXIF|sideways|turn|orientation",
        change=(remove(f"{IMAGES}/*.png"), config("= 64", "= 128"), sideways("000.jpg", (256, 64))),
        truth={"sizes": [[256, 64]]},
    ),
    trains("a photo stored upright", change=picture("004.jpg")),
    *(
        trains(f"a picture: {n}", "--max_train_steps=10", recipe=CLASSIC, change=picture(*options))
        for n, options in ODD_PICTURES.items()
    ),
    trains("a picture: animated", change=animated("004.webp")),
    *(
        case
        for name, (number, broken) in BROKEN.items()
        for case in (
            fails(f"a picture that is {name}", number, change=broken),
            fails(
                f"a picture that is {name}, with classic",
                number,
                "--max_train_steps=10",
                recipe=CLASSIC,
                change=broken,
            ),
        )
    ),
    trains(
        "pictures that are links",
        change=(
            move(IMAGES, "elsewhere"),
            folder(IMAGES),
            *(
                link(f"{IMAGES}/{n}.png", f"elsewhere/{n}.png", absolute=True)
                for n in ("000", "001")
            ),
            caption(0, "a dog"),
            caption(1, "a cat"),
        ),
    ),
    warns(
        "a cache that an older picture left",
        "npz",
        "--cache_latents_to_disk",
        change=(leftover_cache("000.npz"), picture("000.png")),
    ),
    warns(
        "a cache of another shape that is not checked",
        "npz",
        "--cache_latents_to_disk",
        "--skip_cache_check",
        change=leftover_cache("000.npz", (128, 64)),
        before_0_10="skip_cache_check",
    ),
    trains("a cache that is not used", change=leftover_cache("000.npz")),
    trains("alpha masks", change=(picture("004.png", mode="RGBA"), add("alpha_mask = true\n"))),
]

# ---- Captions ------------------------------------------------------------------------------------

CLASS_TOKENS = add('class_tokens = "A [v]"\n')
CAPTIONS = [
    warns(
        "captions of the ending .caption beside class_tokens",
        r"\.caption",
        change=(sample_config, rename_captions(".caption")),
        truth={"captions": ["A [v]"]},
    ),
    warns(
        "captions of the ending .png.txt beside class_tokens",
        r"\.png\.txt",
        change=(sample_config, rename_captions(".png.txt")),
        truth={"captions": ["A [v]"]},
    ),
    warns(
        "captions of the ending .caption alone",
        "caption",
        change=rename_captions(".caption"),
        truth={"captions": [""]},
    ),
    trains(
        "captions of the ending that is asked for",
        change=(rename_captions(".caption"), config('".txt"', '".caption"')),
    ),
    trains(
        "class_tokens and no captions",
        change=(CLASS_TOKENS, remove(f"{IMAGES}/*.txt")),
        truth={"captions": ["A [v]"]},
    ),
    warns(
        "no captions at all", "caption", change=remove(f"{IMAGES}/*.txt"), truth={"captions": [""]}
    ),
    warns("one picture without a caption", "caption", change=remove(f"{IMAGES}/000.txt")),
    warns(
        "captions that begin with an empty line",
        "line",
        change=captions("\na dog\n"),
        truth={"captions": [""]},
    ),
    warns(
        "captions of several lines",
        "line",
        change=captions("a dog\nin the park\n"),
        truth={"captions": ["a dog"]},
    ),
    warns("a caption of 80 words", "75", change=captions(", ".join(["dog"] * 80))),
    trains(
        "a caption of 80 words, with room",
        "--max_token_length=225",
        change=captions(" ".join(["dog"] * 80)),
    ),
    fails("an empty caption", "000.txt", change=caption(0, b"")),
    warns("a caption of a space", "000.txt|caption", change=caption(0, b" \n")),
    fails("a caption in cp1252", "000.txt", change=caption(0, "a café".encode("cp1252"))),
    trains("a caption with CRLF", change=captions(b"a dog\r\n"), truth={"captions": ["a dog"]}),
    trains("a caption with a byte order mark", change=captions(b"\xef\xbb\xbfa dog\n")),
]

# ---- The checkpoint ------------------------------------------------------------------------------

THIS = f"--pretrained_model_name_or_path={CHECKPOINT}"
CHECKPOINTS = [
    fails("no checkpoint", "sdxl", THIS),
    fails("an empty checkpoint", "sdxl", THIS, change=write(CHECKPOINT, b"")),
    fails(
        "a page in HTML as a checkpoint", "sdxl", THIS, change=write(CHECKPOINT, b"<html></html>")
    ),
    fails(
        "a checkpoint that is cut off",
        "sdxl",
        THIS,
        change=(checkpoint(dict), cut_hole),
    ),
    fails(
        "a checkpoint without VAE", "VAE", THIS, change=checkpoint(without("first_stage_model."))
    ),
    fails("an inpainting checkpoint", "inpaint", THIS, change=checkpoint(inpainting)),
    fails("a distilled checkpoint", "SSD|distilled", THIS, change=checkpoint(distilled)),
    fails("a checkpoint of SD 1.5", "SDXL", THIS, change=checkpoint(sd15)),
    fails(
        "a checkpoint without the second text encoder",
        "sdxl",
        THIS,
        change=checkpoint(without("conditioner.embedders.1.")),
    ),
    fails(
        "a checkpoint that lacks one tensor of the U-Net",
        "out.2.bias",
        THIS,
        change=checkpoint(without(f"{UNET}out.2.bias")),
    ),
    fails(
        "a checkpoint that lacks one tensor of a text encoder",
        "sdxl",
        THIS,
        change=checkpoint(
            without("conditioner.embedders.0.transformer.text_model.final_layer_norm.b")
        ),
    ),
    fails(
        "a checkpoint that lacks one tensor of the VAE",
        "sdxl",
        THIS,
        change=checkpoint(without("first_stage_model.decoder.conv_out.bias")),
    ),
    fails(
        "a checkpoint with a tensor too many in the U-Net",
        "sdxl",
        THIS,
        change=checkpoint(with_tensors(model__diffusion_model__extra=[1])),
    ),
    fails(
        "the U-Net alone", "sdxl", THIS, change=checkpoint(without("conditioner.", "first_stage"))
    ),
    fails(
        "a LoRA as a checkpoint", "sdxl", THIS, change=checkpoint(lambda _: {"lora_unet_x": [4, 4]})
    ),
    trains(
        "a checkpoint of v-prediction",
        THIS,
        "--v_parameterization",
        change=checkpoint(with_tensors(v_pred=[0], ztsnr=[0])),
    ),
    trains(
        "a checkpoint with the weights of EMA",
        THIS,
        change=checkpoint(with_tensors(model_ema__decay=[1], denoiser__sigmas=[1000])),
    ),
    trains(
        "a checkpoint with position ids",
        THIS,
        change=checkpoint(
            with_tensors(
                conditioner__embedders__0__transformer__text_model__embeddings__position_ids=[1, 77]
            )
        ),
    ),
    trains(
        "a checkpoint without logit scale",
        THIS,
        change=checkpoint(without("conditioner.embedders.1.model.logit_scale")),
    ),
    trains("a checkpoint in bf16", THIS, change=checkpoint(dict, "BF16")),
    trains("a checkpoint in fp32", THIS, change=checkpoint(dict, "F32")),
    trains(
        "a checkpoint that is an absolute link",
        "--pretrained_model_name_or_path=models/x.safetensors",
        change=(checkpoint(dict), link("models/x.safetensors", CHECKPOINT, absolute=True)),
    ),
    fails(
        "a checkpoint that is a relative link",
        "link",
        "--pretrained_model_name_or_path=models/x.safetensors",
        change=(checkpoint(dict), link("models/x.safetensors", f"../{CHECKPOINT}")),
    ),
    trains(
        "a checkpoint that is a relative link in this folder",
        "--pretrained_model_name_or_path=x.safetensors",
        change=(checkpoint(dict), link("x.safetensors", CHECKPOINT)),
    ),
    fails(
        "a folder that is no diffusers model",
        "models",
        "--pretrained_model_name_or_path=models",
        change=folder("models"),
    ),
    fails(
        "a checkpoint of the ending .ckpt that is none",
        "x.ckpt",
        "--pretrained_model_name_or_path=x.ckpt",
        change=write("x.ckpt", b"<html></html>"),
    ),
    trains(
        "a checkpoint with a space in its path",
        "--pretrained_model_name_or_path=my models/x.safetensors",
        change=(checkpoint(dict), move(CHECKPOINT, "my models/x.safetensors")),
    ),
    fails("a VAE that is not there", "vae", "--vae=gone.safetensors"),
    fails(
        "a page in HTML as a VAE",
        "vae",
        "--vae=x.safetensors",
        change=write("x.safetensors", b"<html></html>"),
    ),
]

OF_DATA = [*RECIPES, *CONFIGS, *FOLDERS, *PICTURES, *CAPTIONS, *CHECKPOINTS]
