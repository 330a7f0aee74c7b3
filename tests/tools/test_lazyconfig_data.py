"""What tools/lazyconfig_train_net.py finds out about data before it trains."""

import importlib.util
from pathlib import Path

import pytest
from data.small_coco import coco
from detectron2.config import LazyConfig

from wsbcn_d2.engine import ConfigError

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "LazyConfig" / "mask_rcnn_R_50_FPN_1x.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("t", ROOT / "tools" / "lazyconfig_train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(train, test):
    cfg = LazyConfig.load(str(CONFIG))
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = train, test
    return cfg


def test_data(tool, register):
    good, other = register(coco()), register(coco(classes=("dog", "cat")))
    bare = register(coco(segmentation=None))
    both = ("train", "test")
    tool.check_data(config(good, [good]), both)
    cases = [
        (good, other, both, "dataloader: the thing_classes of .* in another order"),
        (
            good,
            bare,
            both,
            "dataloader.train.mapper.use_instance_mask is True, but .* no segmentat",
        ),
        (bare, good, both, "no segmentation; all"),
        ([], good, both, "dataloader.train.dataset.names is empty"),
        (good, [], ("test",), "dataloader.test.dataset.names is empty"),
    ]
    for train, test, parts, message in cases:
        with pytest.raises(ConfigError, match=message):
            tool.check_data(config(train, test), parts)
    tool.check_data(config(bare, good), ("test",))
    cfg = config(good, good)
    del cfg.dataloader["evaluator"]
    tool.check_data(cfg, both)
    with pytest.raises(ConfigError, match="no dataloader.evaluator, so there is nothing to evalu"):
        tool.check_data(cfg, ("test",))
