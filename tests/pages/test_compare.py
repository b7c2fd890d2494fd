"""docs/compare.json draws one seed without a LoRA, with content, with style and with both.

ComfyUI's nodes are known by tests/data/comfyui_nodes.json. With COMFYUI_ROOT, a checkout, and
COMFYUI_PYTHON, the Python that runs it, ComfyUI itself is asked for them.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
from kohya_folder import ROOT

WORKFLOW = json.loads((ROOT / "docs/compare.json").read_text(encoding="utf-8"))
CORE = json.loads((ROOT / "tests/data/comfyui_nodes.json").read_text(encoding="utf-8"))
NODES = {node["id"]: node for node in WORKFLOW["nodes"]}
LINKS = {link[0]: link[1:] for link in WORKFLOW["links"]}
# The page's own: a note, and a number that several nodes are linked to.
OF_THE_PAGE = {"MarkdownNote", "PrimitiveNode"}
KINDS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
CONTENT, STYLE = ("my_content.safetensors", 1), ("my_style.safetensors", 1)
# The files that each picture's model goes through, with their strengths.
ROWS = {"without": [], "content": [CONTENT], "style": [STYLE]}
ROWS["content and style"] = [CONTENT, STYLE]


TITLED = {node["title"]: node for node in NODES.values() if "title" in node}


def source(node: dict[str, Any], name: str) -> dict[str, Any]:
    """The node that an input is linked to."""
    [link] = [given["link"] for given in node["inputs"] if given["name"] == name]
    return NODES[LINKS[link][0]]


def widgets(node: dict[str, Any]) -> dict[str, Any]:
    """A core node's values by name; the page shows what a seed does after a run behind it."""
    inputs = CORE[node["type"]]["inputs"]
    names = [name for name, kind in inputs.items() if isinstance(kind, list) or kind in KINDS]
    if "seed" in names:
        names.insert(names.index("seed") + 1, "control_after_generate")
    return dict(zip(names, node.get("widgets_values", []), strict=True))


def sampler(row: str) -> dict[str, Any]:
    return source(source(TITLED[row], "images"), "samples")


def test_every_link_has_both_its_ends_and_every_input_a_link():
    for number, (start, out, end, into, kind) in LINKS.items():
        output, given = NODES[start]["outputs"][out], NODES[end]["inputs"][into]
        assert number in output["links"]
        assert given["link"] == number
        assert output["type"] == given["type"] == kind
    outputs = [output for node in NODES.values() for output in node.get("outputs", [])]
    assert sorted(link for output in outputs for link in output["links"]) == sorted(LINKS)
    assert all(given["link"] in LINKS for n in NODES.values() for given in n.get("inputs", []))


def test_every_node_and_link_has_a_number_of_its_own():
    assert (len(NODES), len(LINKS)) == (len(WORKFLOW["nodes"]), len(WORKFLOW["links"]))
    assert (max(NODES), max(LINKS)) == (WORKFLOW["last_node_id"], WORKFLOW["last_link_id"])


@pytest.mark.parametrize("number", [n for n in NODES if NODES[n]["type"] not in OF_THE_PAGE])
def test_every_node_is_one_of_comfyuis_with_its_inputs_outputs_and_values(number):
    node = NODES[number]
    known = CORE[node["type"]]
    linked = {given["name"]: given["type"] for given in node.get("inputs", [])}
    values = widgets(node)
    assert linked.items() <= known["inputs"].items()
    assert linked.keys() | values.keys() >= known["inputs"].keys()
    assert [output["type"] for output in node.get("outputs", [])] == known["outputs"]
    for name, value in values.items():
        kind = known["inputs"].get(name) or [value]  # a list of files is empty there
        assert value in kind if isinstance(kind, list) else isinstance(value, KINDS[kind])


def test_nodes_lie_side_by_side_within_a_group():
    # A node's title of 30 lies above its place.
    boxes = [(*node["pos"], *node["size"]) for node in NODES.values()]
    boxes = [(x, y - 30, x + width, y + height) for x, y, width, height in boxes]
    groups = [(x, y, x + w, y + h) for x, y, w, h in (g["bounding"] for g in WORKFLOW["groups"])]
    for x, y, end, low in boxes:
        assert any(gx <= x and gy <= y and end <= ge and low <= gl for gx, gy, ge, gl in groups)
        over = [ox < end and x < oe and oy < low and y < ol for ox, oy, oe, ol in boxes]
        assert over.count(True) == 1  # itself


@pytest.mark.parametrize("row", ROWS)
def test_each_picture_has_its_slices_at_strength_1(row):
    model, loras = source(sampler(row), "model"), []
    while model["type"] == "LoraLoaderModelOnly":
        given = widgets(model)
        loras.insert(0, (given["lora_name"], given["strength_model"]))
        model = source(model, "model")
    assert model["type"] == "CheckpointLoaderSimple"
    assert loras == ROWS[row]


def test_all_else_is_the_same_in_the_four():
    first, *others = samplers = [sampler(row) for row in ROWS]
    for other in others:
        assert widgets(other) == widgets(first)
        for name in ("positive", "negative", "latent_image", "seed"):
            assert source(other, name) is source(first, name)
    types = [node["type"] for node in NODES.values()]
    assert types.count("KSampler") == len({node["id"] for node in samplers}) == 4
    assert types.count("EmptyLatentImage") == 1
    assert source(first, "seed")["widgets_values"][1] == "fixed"
    assert source(first, "latent_image")["widgets_values"] == [1024, 1024, 1]


def test_the_pictures_stand_side_by_side_in_the_order_of_the_title():
    save = TITLED[" | ".join(ROWS)]
    order, node = [], source(save, "images")
    while node["type"] == "ImageStitch":
        assert widgets(node)["direction"] == "right"
        order.insert(0, source(node, "image2"))
        node = source(node, "image1")
    assert [node, *order] == [source(TITLED[row], "images") for row in ROWS]


def test_the_prompt_has_the_trigger_of_the_dataset_config_as_it_was_trained():
    prompt = source(sampler("without"), "positive")
    assert prompt["widgets_values"][0].startswith("A [v] ")
    assert 'class_tokens = "A [v]"' in (ROOT / "blora_dataset.toml").read_text(encoding="utf-8")


COMFYUI = os.environ.get("COMFYUI_ROOT", ""), os.environ.get("COMFYUI_PYTHON", "")


@pytest.mark.skipif(not all(COMFYUI), reason="NOT RUN: COMFYUI_ROOT, COMFYUI_PYTHON are not set")
def test_comfyui_has_these_nodes_with_these_inputs_and_choices():
    folder, python = COMFYUI
    command = [python, ROOT / "tests/support/comfyui_nodes.py", *CORE]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    real = json.loads(done.stdout)
    for name, known in CORE.items():
        assert real[name]["outputs"] == known["outputs"]
        assert list(real[name]["inputs"]) == list(known["inputs"])
        for given, kind in known["inputs"].items():
            there = real[name]["inputs"][given]
            # A newer release has more samplers to choose from.
            assert set(kind) <= set(there) if isinstance(kind, list) else kind == there
