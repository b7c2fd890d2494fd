"""Cases of trainer_cases.py that lie in the options: network, optimizer, scheduler, output."""

from __future__ import annotations

from kohya_folder import ROOT
from trainer_case import CLASSIC, CONTENT_STYLE, EVERY_LAYER, OLD_LYCORIS, fails, trains, warns
from trainer_folder import (
    CONFIG,
    add,
    folder,
    preset,
    write,
)

STYLE_ONLY = 80  # modules of the attention of one block
TEXT_ENCODERS = 176
PRESETS = "lycoris_presets"
PRESET = f"preset={PRESETS}/blora_content_style.toml"
LYCORIS = "--network_module=lycoris.kohya"
PLAIN = (LYCORIS, "--network_args", PRESET)
UNET_ONLY = ("network_train_unet_only",)

# ---- Modules and presets -------------------------------------------------------------------------

OWN = (LYCORIS, "--network_args", "preset=my.toml")
DORA_WD = preset("my.toml", before="dora_wd = true\n")
EXCLUDED = preset("my.toml", more=r"exclude_name = ['.*attn2.*']")
OF_PRESETS = [
    *(
        trains(
            f"the preset {path.stem}", LYCORIS, "--network_args", f"preset={PRESETS}/{path.name}"
        )
        for path in sorted((ROOT / PRESETS).glob("*.toml"))
    ),
    *(
        trains(f"the recipe's preset in LyCORIS {release}", *PLAIN, lycoris=release)
        for release in ("3.4.0", OLD_LYCORIS)
    ),
    trains("text encoders too", less=UNET_ONLY, truth={"modules": CONTENT_STYLE + TEXT_ENCODERS}),
    warns(
        "network arguments without a preset",
        "preset",
        "--network_args",
        "conv_dim=4",
        truth={"modules": EVERY_LAYER},
    ),
    warns(
        "a preset with a space before =",
        "preset",
        LYCORIS,
        "--network_args",
        "preset = lycoris_presets/blora_content_style.toml",
        truth={"modules": EVERY_LAYER},
    ),
    trains("conv_dim=1, as the GUI has it", *PLAIN, "conv_dim=1", "conv_alpha=1", "algo=lora"),
    trains("a preset of LyCORIS' own", LYCORIS, "--network_args", "preset=attn-only"),
    fails("a preset that is not there", "gone.toml", LYCORIS, "--network_args", "preset=gone.toml"),
    trains("an own preset", *OWN, change=preset("my.toml"), truth={"modules": STYLE_ONLY}),
    fails("a preset that fits nothing", "my.toml", *OWN, change=preset("my.toml", "no_such_block")),
    fails("a preset that is no TOML", "my.toml", *OWN, change=write("my.toml", "a preset")),
    # toml reads a list that is not closed as if it were not there.
    warns(
        "a preset that is cut off",
        "my.toml",
        *OWN,
        change=write("my.toml", "unet_target_name = [\n"),
        truth={"modules": EVERY_LAYER},
    ),
    fails("a pattern that is none", "my.toml", *OWN, change=preset("my.toml", "attn[12")),
    fails("a preset with dora_wd at its top", "dora_wd", *OWN, change=DORA_WD),
    trains(
        "a preset with dora_wd at its top, in LyCORIS 3.2.0",
        *OWN,
        change=DORA_WD,
        lycoris=OLD_LYCORIS,
        truth={"modules": STYLE_ONLY},
    ),
    trains("a preset that excludes", *OWN, change=EXCLUDED, truth={"modules": STYLE_ONLY // 2}),
    trains(
        "a preset that excludes, in LyCORIS 3.2.0",
        *OWN,
        change=EXCLUDED,
        lycoris=OLD_LYCORIS,
        truth={"modules": STYLE_ONLY},
    ),
    trains(
        "a preset with = in its name",
        LYCORIS,
        "--network_args",
        "preset=my=preset.toml",
        change=preset("my=preset.toml"),
        before_0_10="network_args",
    ),
    trains(
        "a preset with a space in its name",
        LYCORIS,
        "--network_args",
        "preset=my preset.toml",
        change=preset("my preset.toml"),
    ),
]

# ---- Network arguments ---------------------------------------------------------------------------

ALGOS = ("locon", "loha", "lokr", "dylora", "glora", "ia3", "diag-oft")
BYPASS = "bypass_mode=True"
NETWORKS = [
    *(trains(f"algo={algo}", *PLAIN, f"algo={algo}") for algo in (*ALGOS, "full")),
    *(trains(f"algo={algo} with bypass", *PLAIN, f"algo={algo}", BYPASS) for algo in ALGOS),
    fails("algo=full with bypass", "bypass", *PLAIN, "algo=full", BYPASS),
    fails("algo=boft of a rank that it cannot have", "boft", *PLAIN, "algo=boft"),
    fails("algo=dora", "algo", *PLAIN, "algo=dora"),
    fails("dora_wd without =", "dora_wd", *PLAIN, "dora_wd"),
    trains("DoRA", *PLAIN, "dora_wd=True", "wd_on_output=False"),
    fails(
        "DoRA with bypass",
        "bypass_mode",
        "--network_args",
        PRESET,
        "dora_wd=True",
        "bypass_mode=True",
    ),
    trains("use_tucker and rs_lora", *PLAIN, "use_tucker=True", "rs_lora=True"),
    trains("dropout", *PLAIN, "rank_dropout=0.1", "module_dropout=0.1"),
    trains("dropout in both ways", *PLAIN, "dropout=0.1", "--network_dropout=0.1"),
    trains("an argument that nobody knows", *PLAIN, "such_a_thing=1"),
    fails("an argument that is no number", "conv_dim=four", *PLAIN, "conv_dim=four"),
    fails("a rank of 0", "network_dim", "--network_dim=0"),
    fails("a rank with a comma", "network_dim", "--network_dim=4,5"),
    warns(
        "a rank below the alpha",
        "alpha",
        "--network_dim=8",
        "--network_alpha=1024",
        truth={"scale": 128.0},
    ),
    trains("an alpha of 1", "--network_alpha=1", truth={"scale": 0.25}),
    fails("a network module that is not there", "network_module", "--network_module=lycoris.koyha"),
    warns(
        "sd-scripts' own LoRA with a preset",
        "network_module|preset",
        "--network_module=networks.lora",
        "--network_args",
        PRESET,
    ),
    fails("no network module", "network_module", less=("network_module",)),
]

# ---- Going on ------------------------------------------------------------------------------------

WEIGHTS = "--network_weights=before/demo_1.safetensors"
RESUMED = "--resume=before/demo_1-state"
GOING_ON = [
    trains("going on", WEIGHTS, after="the fast recipe"),
    trains("going on from weights alone", WEIGHTS, "--dim_from_weights", after="the fast recipe"),
    fails(
        "going on with another rank",
        "network_dim|rank",
        WEIGHTS,
        "--network_dim=8",
        after="the fast recipe",
    ),
    fails("going on from nothing", "network_weights", "--network_weights=gone.safetensors"),
    fails(
        "going on from a page in HTML",
        "network_weights",
        "--network_weights=x.safetensors",
        change=write("x.safetensors", b"<html></html>"),
    ),
    fails("weights alone, of no file", "network_weights", "--dim_from_weights"),
    trains("a state at the end", "--save_state", "--max_train_steps=2"),
    trains("resuming", RESUMED, "--max_train_steps=4", after="a state at the end"),
    fails("resuming at the end", "max_train_steps|resume", RESUMED, after="a state at the end"),
    fails("resuming from nothing", "resume", "--resume=gone"),
    fails("resuming from an empty folder", "resume", "--resume=gone", change=folder("gone")),
    fails("a base weight that is not there", "base_weights", "--base_weights", "gone.safetensors"),
]

# ---- Optimizers ----------------------------------------------------------------------------------


def optimizer(name: str, *words: str, rate: str = "1e-4") -> tuple[str, ...]:
    arguments = ("--optimizer_args", *words)
    return f"--optimizer_type={name}", f"--learning_rate={rate}", *arguments


PRODIGY = ("--optimizer_args", "decouple=True")
OPTIMIZERS = [
    fails("AdamW with Prodigy's arguments", "optimizer_args", "--optimizer_type=AdamW"),
    warns("AdamW at a rate of 1", "learning_rate|rate", *optimizer("AdamW", rate="1.0")),
    warns("Prodigy at 1e-4", "learning_rate|rate", "--learning_rate=1e-4"),
    trains("AdamW", *optimizer("AdamW", "weight_decay=1e-2", "betas=0.9,0.99")),
    trains("adamw in lower case", *optimizer("adamw")),
    trains("Lion", *optimizer("Lion")),
    trains("SGDNesterov", *optimizer("SGDNesterov")),
    trains("Adafactor", *optimizer("Adafactor", "relative_step=False", "scale_parameter=False")),
    trains("Adafactor with its own rate", *optimizer("Adafactor", "relative_step=True")),
    trains("an optimizer of torch by its path", *optimizer("torch.optim.RAdam")),
    trains("Prodigy by its path", "--optimizer_type=prodigyopt.Prodigy"),
    trains(
        "an optimizer without a schedule",
        *optimizer("AdamWScheduleFree"),
        before_0_10="optimizer_type",
    ),
    fails("an optimizer of no name", "optimizer_type", "--optimizer_type=Prodgy"),
    fails(
        "an optimizer without its package", "dadaptation|optimizer_type", *optimizer("DAdaptAdam")
    ),
    fails("8 bits without bitsandbytes", "bitsandbytes", *optimizer("AdamW8bit")),
    fails("a comma too many", "weight_decay", *PRODIGY, "weight_decay=0.5,"),
    fails("betas split at a space", "optimizer_args|betas", *PRODIGY, "betas=(0.9,", "0.999)"),
    fails("a word in place of a number", "weight_decay", *PRODIGY, "weight_decay=small"),
    fails("an argument of no optimizer", "weight_dekay", *PRODIGY, "weight_dekay=0.1"),
    fails("a rate that is no number", "learning_rate", "--learning_rate=1e-"),
    trains("rates for the parts", "--unet_lr=1", "--text_encoder_lr=1"),
]

# ---- Schedulers ----------------------------------------------------------------------------------

WARM = ("--lr_warmup_steps=1",)
SCHEDULERS = [
    *(
        trains(f"the scheduler {name}", f"--lr_scheduler={name}")
        for name in (
            "linear",
            "constant",
            "cosine_with_restarts",
            "polynomial",
            "constant_with_warmup",
        )
    ),
    trains(
        "restarts and warm-up",
        "--lr_scheduler=cosine_with_restarts",
        "--lr_scheduler_num_cycles=2",
        *WARM,
    ),
    trains("warm-up as a share", "--lr_warmup_steps=0.5"),
    fails("a scheduler misspelt", "lr_scheduler", "--lr_scheduler=cosin"),
    fails("constant after a warm-up", "lr_warmup_steps", "--lr_scheduler=constant", recipe=CLASSIC),
    trains(
        "a scheduler of torch",
        "--lr_scheduler_type=CosineAnnealingLR",
        "--lr_scheduler_args",
        "T_max=10",
    ),
    fails(
        "a scheduler of torch misspelt", "lr_scheduler_type", "--lr_scheduler_type=CosinAnnealingLR"
    ),
    fails(
        "a scheduler of torch without its argument",
        "lr_scheduler|T_max",
        "--lr_scheduler_type=CosineAnnealingLR",
    ),
    fails("a scheduler that needs a rate", "lr_scheduler", "--lr_scheduler=cosine_with_min_lr"),
    trains(
        "a scheduler with its least rate",
        "--lr_scheduler=cosine_with_min_lr",
        "--lr_scheduler_min_lr_ratio=0.1",
    ),
    fails("rules without a word", "lr_scheduler", "--lr_scheduler=piecewise_constant"),
]

# ---- Steps, saves and outputs --------------------------------------------------------------------

OUTPUTS = [
    trains("an option cut short", "--max_train_step=2"),
    trains("epochs", "--max_train_epochs=1"),
    fails("no step", "max_train_steps", "--max_train_steps=0"),
    fails("no epoch", "max_train_epochs", "--max_train_epochs=0"),
    fails("an option misspelt", "max_train_stepss", "--max_train_stepss=2"),
    trains("a save each step", "--save_every_n_steps=1", "--save_last_n_steps=1"),
    fails("a save every 0 steps", "save_every_n_steps", "--save_every_n_steps=0"),
    fails("a save every 0 epochs", "save_every_n_epochs", "--save_every_n_epochs=0"),
    trains("the format .pt", "--save_model_as=pt"),
    fails("a format of none", "save_model_as", "--save_model_as=diffusers"),
    fails("a precision of none", "save_precision", "--save_precision=fp8"),
    fails("an output name with a folder", "output_name", "--output_name=a/b"),
    *(
        warns(f"an output name with {mark}", "output_name", f"--output_name=a{mark}b")
        for mark in ":?"
    ),
    trains("an output name with a space", "--output_name=my hero"),
    fails("an output name that is too long", "output_name", f"--output_name={'a' * 260}"),
    fails("no output folder", "output_dir", less=("output_dir",)),
    fails(
        "an output folder that is a file", "output_dir", "--output_dir=x", change=write("x", b"")
    ),
    fails(
        "an output folder below a file", "output_dir", "--output_dir=x/y", change=write("x", b"")
    ),
    fails("an output folder that cannot be made", "/proc", "--output_dir=/proc/blora"),
    warns(
        "an output that is there already",
        "demo_1.safetensors",
        change=write("_out/lora/sdxl/demo_1/demo_1.safetensors", b"old"),
    ),
    trains("states", "--save_state", "--save_every_n_steps=1"),
    trains("no metadata", "--no_metadata"),
]

# ---- The trainer's other options -----------------------------------------------------------------

OTHERS = [
    fails(
        "no workers beside persistent ones",
        "max_data_loader_n_workers",
        "--max_data_loader_n_workers=0",
    ),
    trains("no workers", "--max_data_loader_n_workers=0", less=("persistent_data_loader_workers",)),
    fails("xformers without the package", "xformers", "--xformers"),
    fails("wandb without the package", "wandb", "--log_with=wandb", "--logging_dir=logs"),
    trains("tensorboard", "--log_with=tensorboard", "--logging_dir=logs"),
    fails("tensorboard without a folder", "logging_dir", "--log_with=tensorboard"),
    fails("a crop by chance beside a cache", "random_crop", "--random_crop"),
    fails("colours by chance beside a cache", "color_aug", change=add("color_aug = true\n")),
    trains("flips beside a cache", change=add("flip_aug = true\n")),
    trains("colours by chance", recipe=CLASSIC, change=add("color_aug = true\n")),
    trains("the text's cache", "--cache_text_encoder_outputs"),
    fails(
        "the text's cache beside shuffling",
        "shuffle_caption",
        "--cache_text_encoder_outputs",
        change=add("shuffle_caption = true\n"),
    ),
    fails(
        "the text's cache beside trained encoders",
        "cache_text_encoder_outputs",
        "--cache_text_encoder_outputs",
        less=UNET_ONLY,
    ),
    trains("shuffling", change=add("shuffle_caption = true\nkeep_tokens = 1\n")),
    trains("the latents' cache on disk", "--cache_latents_to_disk"),
    trains("v-prediction", "--v_parameterization", "--zero_terminal_snr"),
    fails(
        "the loss of v-prediction without it",
        "scale_v_pred_loss",
        "--scale_v_pred_loss_like_noise_pred",
    ),
    fails("a model of version 2", "v2", "--v2"),
    trains("clip skip", "--clip_skip=2"),
    trains("noise", "--noise_offset=0.05", "--adaptive_noise_scale=0.01", "--min_snr_gamma=5"),
    fails("adaptive noise alone", "noise_offset", "--adaptive_noise_scale=0.01"),
    trains("the loss of Huber", "--loss_type=huber", "--huber_schedule=snr"),
    fails("a loss of none", "loss_type", "--loss_type=hubr"),
    trains("accumulation", "--gradient_accumulation_steps=2"),
    fails("full bf16 without bf16", "full_bf16", "--full_bf16"),
    fails("fp8 without mixed precision", "fp8_base", "--fp8_base"),
    trains("bf16", "--mixed_precision=bf16"),
    trains("validation", "--validation_split=0.25", before_0_10="validation_split"),
]

# ---- Samples -------------------------------------------------------------------------------------

FIRST = ("--sample_at_first", "--sample_prompts=p.txt")
TOML = ("--sample_at_first", "--sample_prompts=p.toml")
JSON = ("--sample_at_first", "--sample_prompts=p.json")
SIZED = "a dog --w 64 --h 128 --s 1"
DRAWN = {"samples": [[64, 128]]}
NOTHING_DRAWN = {"samples": []}
OF_NO_SIZE = {"samples": [[512, 512]]}  # sd-scripts' default
SAMPLES = [
    trains(
        "the bundle's prompts",
        "--sample_at_first",
        "--sample_prompts=blora_prompts.txt",
        change=write("blora_prompts.txt", (ROOT / "blora_prompts.txt").read_bytes()),
        truth={"samples": [[1024, 1024]] * 3},
    ),
    trains(
        "prompts",
        *FIRST,
        "--sample_every_n_steps=1",
        change=write("p.txt", f"# a comment --w abc\n\n{SIZED}\n"),
        truth={"samples": [[64, 128]] * 3},
    ),
    trains(
        "prompts of a size that is no multiple of 8",
        *FIRST,
        change=write("p.txt", "a dog --w 71 --h 130 --s 1"),
        truth=DRAWN,
    ),
    trains("prompts in JSON", *JSON, change=write("p.json", f'["{SIZED}"]'), truth=DRAWN),
    trains(
        "prompts in TOML",
        *TOML,
        change=write(
            "p.toml",
            'prompt.width = 64\nprompt.sample_steps = 1\n[[prompt.subset]]\nprompt = "a dog"\n'
            "height = 128\n",
        ),
        truth=DRAWN,
    ),
    fails("prompts without a file", "sample_prompts", "--sample_every_n_steps=1"),
    warns(
        "prompts that are not there",
        "sample_prompts",
        "--sample_every_n_steps=1",
        "--sample_prompts=gone.txt",
        truth=NOTHING_DRAWN,
    ),
    fails("prompts in cp1252", "p.txt", *FIRST, change=write("p.txt", "a café".encode("cp1252"))),
    warns("no prompt", "p.txt", *FIRST, change=write("p.txt", "# a\n\n"), truth=NOTHING_DRAWN),
    warns("no prompt in JSON", "p.json", *JSON, change=write("p.json", "[]"), truth=NOTHING_DRAWN),
    *(
        warns(
            f"a comment with {before!r} before it",
            "comment",
            *FIRST,
            change=write("p.txt", f"{before}# a dog --w 64 --h 128 --s 1\n"),
            truth=DRAWN,
        )
        for before in (" ", "\ufeff")
    ),
    *(
        warns(
            f"a prompt with --{part}",
            f'"--{part}"',
            *FIRST,
            change=write("p.txt", f"a dog --s 1 --{part}\n"),
            truth=OF_NO_SIZE,
        )
        for part in ("w abc", "w=64", "width 64", "seed 1", "d -1", "l .")
    ),
    fails("prompts that are no JSON", "JSON", *JSON, change=write("p.json", "a dog\n")),
    fails("prompts that are one in JSON", "p.json", *JSON, change=write("p.json", '"a dog"')),
    fails("prompts in a table in JSON", "p.json", *JSON, change=write("p.json", '{"a": "dog"}')),
    fails("prompts that are no TOML", "TOML", *TOML, change=write("p.toml", "a dog\n")),
    fails("prompts in TOML without their table", "p.toml", *TOML, change=write("p.toml", "")),
    fails(
        "prompts in TOML with a number twice",
        "p.toml",
        *TOML,
        change=write(
            "p.toml", 'prompt.width = 64\n[[prompt.subset]]\nprompt = "a dog"\nwidth = 128\n'
        ),
    ),
]

# ---- --config_file, as the GUI starts it ---------------------------------------------------------

GUI = f"""\
dataset_config = "{CONFIG}"
network_dim = 8
optimizer_args = ["decouple=True", "weight_decay=0.01"]
network_args = ["{PRESET}"]
"""
FILES = [
    trains(
        "settings in a file",
        "--config_file=gui.toml",
        less=("dataset_config",),
        change=write("gui.toml", GUI),
    ),
    trains(
        "settings in a file without its ending",
        "--config_file=gui",
        less=("dataset_config",),
        change=write("gui.toml", GUI),
    ),
    fails("a file of settings that is not there", "config_file", "--config_file=gui.toml"),
    fails(
        "a file of settings that is no TOML",
        "gui.toml",
        "--config_file=gui.toml",
        change=write("gui.toml", "no settings"),
    ),
    trains(
        "a setting in a file that nobody knows",
        "--config_file=gui.toml",
        change=write("gui.toml", "such_a_thing = 1\n"),
    ),
    trains(
        "settings in a file in tables",
        "--config_file=gui.toml",
        less=("dataset_config",),
        change=write("gui.toml", f"[a]\n{GUI}"),
    ),
    fails(
        "a broken setting in a file",
        "lr_scheduler",
        "--config_file=gui.toml",
        less=("lr_scheduler",),
        change=write("gui.toml", 'lr_scheduler = "cosin"\n'),
    ),
]

OF_OPTIONS = [
    *OF_PRESETS,
    *NETWORKS,
    *GOING_ON,
    *OPTIMIZERS,
    *SCHEDULERS,
    *OUTPUTS,
    *OTHERS,
    *SAMPLES,
    *FILES,
]
