"""As sitecustomize.py of a Python: a torchvision built for CUDA loads beside a torch for the CPU.

Else it stops with "operator torchvision::nms does not exist".
"""

import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.blora_torchvision = library


sys.meta_path.insert(0, DeclareOperators())
