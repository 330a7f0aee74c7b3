"""What tools/lazyconfig_train_net.py finds out about data before it trains."""

import importlib.util
from pathlib import Path

import pytest
import torch
from data.small_coco import coco
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluators
from omegaconf import OmegaConf

from wsbcn_d2.engine import ConfigError
from wsbcn_d2.engine.evaluation import CocoFileEvaluator

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
    cfg.model.roi_heads.num_classes = 2
    return cfg


def test_data(tool, register):
    good, other = register(coco()), register(coco(classes=("dog", "cat")))
    bare = register(coco(segmentation=None))
    crowds, three = register(coco(iscrowd=1)), register(coco(classes=("cat", "dog", "cow")))
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
        ("nowhere", good, both, "dataloader.train: no dataset 'nowhere' is registered"),
        (good, ["nowhere"], both, "dataloader.test: no dataset 'nowhere' is registered"),
        (crowds, good, both, "dataloader.train.dataset.names: '.*' have no annotations of objects"),
        (three, three, both, "model.roi_heads.num_classes is 2, but .* has 3"),
    ]
    for train, test, parts, message in cases:
        with pytest.raises(ConfigError, match=message):
            tool.check_data(config(train, test), parts)
    tool.check_data(config(bare, good), ("test",))
    tool.check_data(config([crowds, good], crowds), both)
    cfg = config(crowds, good)
    cfg.dataloader.train.dataset.filter_empty = False
    tool.check_data(cfg, both)
    cfg.dataloader.train.dataset.min_keypoints = 1
    with pytest.raises(ConfigError, match="dataset.min_keypoints is 1, but in .* the most are 0"):
        tool.check_data(cfg, both)
    cfg = config(good, good)
    del cfg.dataloader["evaluator"]
    tool.check_data(cfg, both)
    with pytest.raises(ConfigError, match="no dataloader.evaluator, so there is nothing to evalu"):
        tool.check_data(cfg, ("test",))


def test_data_are_looked_at_before_the_model_is_built(tool, register, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "instantiate", lambda node: pytest.fail(f"built {node}"))
    cfg = config(register(coco()), register(coco(classes=("dog", "cat"))))
    cfg.train.output_dir = str(tmp_path / "out")
    for eval_only in (False, True):
        cfg.train.init_checkpoint = __file__ if eval_only else ""
        names = cfg.dataloader.test.dataset
        names.names = [] if eval_only else names.names
        with pytest.raises(ConfigError, match="dataloader"):
            tool.check(cfg, eval_only, resume=False)
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_a_function_of_its_own(tool):
    """Which is called by Detectron2 only, before the model is built."""
    DatasetCatalog.register("own", list)
    tool.check_data(config("own", "own"), ("train", "test"))
    cfg = config("own", "own")
    del cfg["model"]
    with pytest.raises(ConfigError, match="training data cannot be loaded: Dataset 'own' is emp"):
        tool.train(cfg, resume=False)


def test_all_detections_that_the_model_returns_are_evaluated(tool, register):
    cfg = config("own", register(coco()))
    model = torch.nn.Linear(1, 1)
    model.test_topk_per_image = 300
    evaluator = tool.build_evaluator(cfg.dataloader.evaluator, model)
    assert isinstance(evaluator, CocoFileEvaluator) and evaluator._max_dets_per_image[2] == 300
    cfg.dataloader.evaluator.max_dets_per_image = 50
    evaluator = tool.build_evaluator(cfg.dataloader.evaluator, model)
    assert evaluator._max_dets_per_image == [1, 10, 50]
    cfg.dataloader.evaluator = {"_target_": DatasetEvaluators, "evaluators": []}
    assert type(tool.build_evaluator(cfg.dataloader.evaluator, model)) is DatasetEvaluators


@pytest.mark.parametrize(
    "override, message",
    [
        (("optimizer", None), "^the config has no optimizer$"),
        (("train.eval_period", None), "^the config has no train.eval_period$"),
        (("train.wsbcn", "all"), "^train.wsbcn: 'all' has no keys; allowed are CHECKPOINT_ACT"),
        (
            ("train.max_iter", "abc"),
            "^train.max_iter: must be an integer of at least 1, got 'abc'$",
        ),
        (("train.checkpointer.period", 0), "^train.checkpointer.period: must be .* got 0$"),
        (("optimizer.lr", -0.1), "^optimizer.lr: must be a number of at least 0.0, got -0.1$"),
        (("train.amp.enabled", True), "^train.amp.enabled: True needs a GPU, and the device is"),
    ],
)
def test_parts_that_a_config_needs(tool, tmp_path, override, message):
    cfg = LazyConfig.load(str(CONFIG))
    cfg.train.output_dir, cfg.train.device = str(tmp_path), "cpu"
    OmegaConf.update(cfg, *override)
    with pytest.raises(ConfigError, match=message):
        tool.check(cfg, eval_only=False, resume=False)
