"""A module fits where each axis of its tensors fits the others and the layer, in every form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lora_forms import FORMS, INPUT, Form, axis_lengths

from blora.slicer.modules import Module
from blora.tensorfile import Constant

Shapes = dict[str, tuple[int, ...]]
RANK = 3  # unlike any axis of the layers


def module_of(name: str, shapes: Shapes) -> Module:
    return Module(name, {s: Constant("F32", shape, b"") for s, shape in shapes.items()})


def shapes_of(name: str, form: Form) -> Shapes:
    lengths = axis_lengths(name, RANK)
    return {s: tuple(n for axis in axes for n in lengths[axis]) for s, axes in form.axes.items()}


def one_axis_longer(shapes: Shapes) -> Iterator[tuple[str, Shapes]]:
    for suffix, shape in shapes.items():
        for axis in range(len(shape)):
            # By two: twice the 320 inputs of the 1x1 convolution would be its 640 outputs.
            longer = (*shape[:axis], shape[axis] + 2, *shape[axis + 1 :])
            yield f"axis {axis} of {suffix}", shapes | {suffix: longer}


@pytest.mark.parametrize("form", FORMS)
def test_a_module_fits_until_one_of_its_axes_is_longer(form):
    for kind in FORMS[form].kinds:
        shapes = shapes_of(INPUT[kind], FORMS[form])
        assert module_of(INPUT[kind], shapes).fits
        fit = [
            changed
            for changed, longer in one_axis_longer(shapes)
            if module_of(INPUT[kind], longer).fits
        ]
        assert fit == [], kind
