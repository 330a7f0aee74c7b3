"""The line that says what a model is made of."""

import pytest
from detectron2_models import small_model
from torch import nn
from torchvision.ops import Conv2dNormActivation

from wsbcn_d2 import convert, get_norm, summarize


class HeadThatKnowsOneString(nn.Module):
    """As the heads of some projects build their norms."""

    def __init__(self, norm):
        super().__init__()
        self.tower = Conv2dNormActivation(8, 32, norm_layer=None, activation_layer=None)
        if norm == "GN":
            self.tower.append(nn.GroupNorm(32, 32))
        self.logits = nn.Conv2d(32, 2, 1)


def detector(norm):
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 32, 3), get_norm("BCN+WS", 32))
    model.heads = nn.ModuleDict({"fcos": HeadThatKnowsOneString(norm), "rpn": nn.Conv2d(8, 8, 1)})
    return model


def test_part_that_did_not_heed_the_option():
    assert summarize(detector("BCN+WS")).endswith("; no norms in heads (3 convolutions)")
    model = detector("GN")
    assert "no norms" not in summarize(model)
    model.heads["other"] = HeadThatKnowsOneString("BCN+WS")
    assert summarize(model).endswith("; no norms in heads.other (2 convolutions)")
    convert(model.heads["fcos"], "BCN+WS")
    assert "heads 1 of 5" in summarize(model) and "2 BatchChannelNorm" in summarize(model)


@pytest.mark.parametrize("norm", ["BCN+WS", "GN+WS", "CN"])
def test_models_of_detectron2(norm):
    model = small_model("Base-RCNN-FPN.yaml", norm)
    assert summarize(model).endswith("no norms in proposal_generator (3 convolutions)")
    model = small_model("Base-RCNN-FPN.yaml", norm, ROI_MASK_HEAD__NORM="")
    assert "roi_heads.mask_head (3 convolutions)" in summarize(model)
    assert not summarize(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)))
