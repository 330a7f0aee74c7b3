import importlib.util
import json

import pytest
import torch
from data.small_coco import coco
from detectron2.config import LazyConfig
from detectron2.data import MetadataCatalog
from PIL import Image

from wsbcn_d2 import model_zoo
from wsbcn_d2.engine import ConfigError, check_model, load_config
from wsbcn_d2.engine.setup import TO_EVALUATE, check_processes


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text('MODEL:\n  WEIGHTS: ""\nDATASETS:\n  TRAIN: ()\n  TEST: ()\n')
    return str(path)


def test_device_follows_the_machine(config_file):
    cfg = load_config(config_file, ["MODEL.FPN.NORM", "BCN(groups=16)+WS"], needs=())
    assert cfg.MODEL.FPN.NORM == "BCN(groups=16)+WS"
    assert cfg.MODEL.DEVICE == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load_config(config_file, ["MODEL.DEVICE", "cpu"], needs=()).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    "opts,message",
    [
        (["MODEL.FPN.NORMM", "GN"], "no config key MODEL.FPN.NORMM; close to it.*MODEL.FPN.NORM"),
        (
            ["MODEL.FPN.NORM", "BNC"],
            "MODEL.FPN.NORM: unknown norm option 'BNC'; close to it are BN, BCN; ",
        ),
        (
            ["MODEL.FPN.NORM", "bcn+ws"],
            "unknown norm option 'bcn.ws'; close to it are BCN.WS, .*allowed",
        ),
        (
            ["MODEL.FPN.NORM", "BCN(groups=16"],
            r"'BCN\(groups=16'; close to it are BCN, .*allowed are",
        ),
        (["MODEL.FPN.NORM", "BN(momentum=2)"], "'momentum=2'; BN takes no arguments$"),
        (["MODEL.RESNETS.NORM", "GN(size=3)"], "MODEL.RESNETS.NORM: .*'size=3'; GN takes groups"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS: there is no file 'nowhere.pth'"),
        (["DATASETS.TRAIN", "(5,)"], "no dataset 5 is registered"),
        (["DATASETS.TRAIN", "(['a'],)"], r"no dataset \['a'\] is registered"),
        (["DATASETS.TRAIN", "('coco_2017_trian',)"], "'coco_2017_trian'.*coco_2017_train"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH: must be at least 1, got 0"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD: must be at least 1, got 0"),
        (["TEST.DETECTIONS_PER_IMAGE", "0"], "TEST.DETECTIONS_PER_IMAGE: must be positive.*got 0"),
        (
            ["TEST.DETECTIONS_PER_IMAGE", "-1", "MODEL.META_ARCHITECTURE", "RetinaNet"],
            "-1 for all; got -1 for a RetinaNet",
        ),
        (["MODEL.WSBCN.UPDATE_RATE_SCHEDULE", "cosine"], "'cosine' is not one of 'constant', 'lr'"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"], "LR_SCHEDULER_NAME: .*'WarmupCosineLR'"),
        (["DATALOADER.SAMPLER_TRAIN", "Sampler"], "SAMPLER_TRAIN: 'Sampler' is not one of 'Tr"),
        (["INPUT.RANDOM_FLIP", "horizontl"], "RANDOM_FLIP: 'horizontl' is not one of 'horiz"),
        (["INPUT.MASK_FORMAT", "bitmasks"], "MASK_FORMAT: 'bitmasks' is not one of 'polygon', "),
        (["SOLVER.MAX_ITER", "None"], "SOLVER.MAX_ITER is empty, and must have a value, as 40000"),
        (["DATASETS.COCO_FORMAT", "None"], r"DATASETS.COCO_FORMAT is empty, .* as \(\)"),
        (
            ["MODEL.WSBCN.CHECKPOINT_ACTIVATIONS", "True"],
            "CHECKPOINT_ACTIVATIONS; allowed are '', 'backbone', 'all'$",
        ),
        (
            ["MODEL.WSBCN.CHECKPOINT_ACTIVATIONS", "heads"],
            "CHECKPOINT_ACTIVATIONS: 'heads' is not one of '', 'backbone', 'all'$",
        ),
        (
            ["MODEL.WSBCN.ZERO_INIT_RESIDUAL", "True"],
            "RESIDUAL: build_resnet_backbone cannot do it",
        ),
        (["SOLVER.ACCUMULATE_STEPS", "0"], "SOLVER.ACCUMULATE_STEPS: must be at least 1, got 0"),
        (["TEST.PRECISE_BCN.NUM_IMAGES", "0"], "NUM_IMAGES: must be at least 1, got 0"),
        (["MODEL.WSBCN.SYNC_PERIOD", "-1"], "SYNC_PERIOD: must be at least 0, got -1"),
        (["SEED", "1", "--resume"], "--resume must stand before the keys and values, SEED"),
        (
            ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NORM", "CN"],
            "ROI_BOX_HEAD.NORM: 'CN' has no effect, because NUM_CONV is 0",
        ),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR is empty"),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER: must be at least 1, got 0"),
        (["SOLVER.BASE_LR", "-0.1"], "SOLVER.BASE_LR: must be at least 0, got -0.1"),
        (["SOLVER.WARMUP_METHOD", "x"], "WARMUP_METHOD: 'x' is not one of 'constant', 'linear'"),
        # What Detectron2's loader knows, and its config has no key for.
        (
            ["DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"],
            "is not one of 'TrainingSampler'",
        ),
        (["SOLVER.STEPS", "(20, 10)"], r"STEPS: must be iterations in ascending .* got \(20, 10\)"),
        (["SOLVER.STEPS", "(0.5, 0.9)"], "SOLVER.STEPS: must be iterations in ascending order"),
        (
            ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "RetinaNet"],
            "TEST.AUG.ENABLED: a RetinaNet cannot be evaluated with test-time augmentation",
        ),
        (
            ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "PanopticFPN"],
            "TEST.AUG.ENABLED: a PanopticFPN cannot",
        ),
        (
            ["TEST.AUG.ENABLED", "True", "MODEL.KEYPOINT_ON", "True"],
            "TEST.AUG.ENABLED: models with MODEL.KEYPOINT_ON cannot",
        ),
        (["OUTPUT_DIR", __file__], "OUTPUT_DIR: cannot write .* is not a folder"),
        (["DATASETS.COCO_FORMAT", "(('a', 'b'),)"], r"COCO_FORMAT: .*, got \('a', 'b'\)"),
        (["DATASETS.COCO_FORMAT", "('a', 'b', 'c')"], "COCO_FORMAT: .*, got 'a'"),
        (
            ["DATASETS.COCO_FORMAT", "(('coco_2017_val', 'b.json', 'c'),)"],
            "'coco_2017_val' is the name of another dataset, whose files are '.*instances_val2017",
        ),
    ],
)
def test_errors_name_what_was_given_and_what_is_allowed(config_file, opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, opts)


@pytest.mark.parametrize(
    "opts,message",
    [
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE: 'gpu' is not a device, as cuda"),
        (
            ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True"],
            "SOLVER.AMP.ENABLED: True needs a GPU, and the device is 'cpu'",
        ),
    ],
)
def test_devices(config_file, register, opts, message):
    mine = register(coco())
    data = ["DATASETS.TRAIN", (mine,), "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [*data, *opts])
    load_config(config_file, data)


def test_datasets_without_an_evaluator(config_file, register):
    name = register(coco())
    opts = ["DATASETS.TEST", (name,), "MODEL.WEIGHTS", config_file]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", 2]
    load_config(config_file, opts, needs=TO_EVALUATE)
    metadata = vars(MetadataCatalog.get(name))
    for kind, message in ((None, "no evaluator for dataset"), ("lvis", "needs the package lvis")):
        if kind is not None and importlib.util.find_spec(kind):
            continue
        metadata["evaluator_type"] = kind
        with pytest.raises(ConfigError, match=f"DATASETS.TEST: .*{message}"):
            load_config(config_file, opts, needs=TO_EVALUATE)


def test_config_that_is_its_own_base(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("_BASE_: a.yaml")
    with pytest.raises(ConfigError, match="a.yaml is not a YAML config .*its own _BASE_"):
        load_config(str(path))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 1, "cpu", 3), "^3 images per step cannot be shared equally by 2 processes$"),
        ((1, 1, "cpu", 4, 8), "by 8 processes .SOLVER.REFERENCE_WORLD_SIZE.$"),
        ((99, 1, "cuda"), "--num-gpus: 99, but this machine has "),
    ],
)
def test_processes(arguments, message, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        check_processes(*arguments)
    check_processes(2, 1, "cpu", 4)
    check_processes(0, 1, "cpu", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun has started this program several times"):
        check_processes(1, 1, "cpu", 4)


def test_groups_of_a_run_that_is_resumed(config_file, tmp_path):
    """A checkpoint would load with any."""
    opts = ["OUTPUT_DIR", str(tmp_path / "run"), "MODEL.FPN.NORM"]
    (tmp_path / "run").mkdir()
    before = load_config(config_file, [*opts, "GN(groups=8)"], needs=())
    (tmp_path / "run" / "config.yaml").write_text(before.dump())
    for norm in ("GN(groups=8)", "BCN(groups=8)", "SyncBN"):
        load_config(config_file, [*opts, norm], needs=(), resume=True)
    with pytest.raises(ConfigError, match=r"MODEL.FPN.NORM is 'GN', but .* has 'GN.groups=8.'"):
        load_config(config_file, [*opts, "GN"], needs=(), resume=True)
    load_config(config_file, [*opts, "GN"], needs=())


def test_misspelt_key_in_a_file(config_file):
    with open(config_file, "a") as f:
        f.write("SOLVER:\n  MAX_ITERS: 3\n")
    with pytest.raises(ConfigError, match="SOLVER.MAX_ITERS; close to it are SOLVER.MAX_ITER"):
        load_config(config_file)


@pytest.mark.parametrize("text", ["", "just words", "MODEL: [", "MODEL: {WEIGHTS: 3"])
def test_file_that_is_no_config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config.yaml is not a YAML config"):
        load_config(str(path))


def test_evaluation_needs_a_dataset(config_file):
    opts = ["MODEL.WEIGHTS", config_file]
    with pytest.raises(ConfigError, match="DATASETS.TEST is empty, and must name a dataset"):
        load_config(config_file, opts, needs=TO_EVALUATE)


def test_evaluation_needs_weights(config_file):
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty, and must name the checkpoint"):
        load_config(config_file, needs=TO_EVALUATE)


@pytest.mark.parametrize(
    "opts,message",
    [
        (
            ["MODEL.RESNETS.NORM", "BCN(groups=24)+WS"],
            "64 channels.*24 groups.*groups=8.*would work",
        ),
        (["MODEL.BACKBONE.NAME", "build_nothing"], "build_nothing"),
        (["MODEL.RESNETS.DEPTH", "51"], "KeyError 51"),
        (["MODEL.RESNETS.NORM", "GN(groups=24)"], r"would work \(MODEL.RESNETS.NORM\)"),
    ],
)
def test_model_that_cannot_be_built(config_file, opts, message):
    with pytest.raises(ConfigError, match=f"cannot be built: .*{message}"):
        check_model(load_config(config_file, opts, needs=()))


def test_missing_config_file():
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config("nowhere.yaml")


def test_missing_datasets(config_file, tmp_path, monkeypatch, register):
    """Training data may be absent where only evaluation is asked for."""
    mine = register(coco(classes=[str(i) for i in range(10)]))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "d"))
    files = ("$DETECTRON2_DATASETS/a.json", "$DETECTRON2_DATASETS/a")
    opts = ["DATASETS.COCO_FORMAT", [["absent", *files]], "DATASETS.TRAIN", "('absent',)"]
    with pytest.raises(ConfigError, match=f"'absent': its json_file '{tmp_path}/d/a.json' does"):
        load_config(config_file, opts)
    test = ["DATASETS.TEST", (mine,), "MODEL.WEIGHTS", config_file]
    load_config(config_file, [*opts, *test], needs=TO_EVALUATE)
    load_config(config_file, opts, needs=("OUTPUT_DIR",))


def test_only_what_is_needed_must_be_there(config_file, register):
    mine = register(coco())
    elsewhere = [
        *("OUTPUT_DIR", __file__, "DATASETS.TEST", "('coco_2017_val',)"),  # of another machine
        *("DATASETS.TRAIN", (mine,), "MODEL.ROI_HEADS.NUM_CLASSES", 2),
    ]
    load_config(config_file, elsewhere, needs=("TRAIN",))
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty"):
        load_config(config_file, elsewhere, needs=("TRAIN", "WEIGHTS"))
    with pytest.raises(ValueError, match="needs: DATA; allowed are OUTPUT_DIR, TEST, TRAIN, WEI"):
        load_config(config_file, needs=("DATA",))


def test_weights_are_not_needed_to_resume(config_file, tmp_path):
    opts = ["MODEL.WEIGHTS", "nowhere.pth", "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(ConfigError):
        load_config(config_file, opts, resume=True, needs=())
    for name in ("", "model_0000001.pth"):  # as a process leaves it that is killed
        (tmp_path / "last_checkpoint").write_text(name)
        with pytest.raises(
            ConfigError, match=f"last_checkpoint' names '{name}', which is not there"
        ):
            load_config(config_file, opts, resume=True, needs=())
    (tmp_path / "model_0000001.pth").touch()
    load_config(config_file, opts, resume=True, needs=())
    (tmp_path / "last_checkpoint").unlink()  # killed between the two
    (tmp_path / "model_pretrained.pth").touch()
    with pytest.raises(ConfigError, match="has model_0000001.pth, and no last_checkpoint that"):
        load_config(config_file, opts, resume=True, needs=())
    opts[1] = str(tmp_path / "model_pretrained.pth")
    (tmp_path / "model_0000001.pth").unlink()
    load_config(config_file, opts, resume=True, needs=())


def test_config_that_is_no_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\x80\x81")
    with pytest.raises(ConfigError, match="config.yaml cannot be read: .*utf-8"):
        load_config(str(path))


def test_lazy_config():
    with pytest.raises(ConfigError, match="a.py is a LazyConfig; .* tools/lazyconfig_train_net.py"):
        load_config("a.py")


def test_run_of_a_lazy_config(tmp_path):
    """Its config.yaml, given to a tool for YAML configs."""
    cfg = model_zoo.get_config("LazyConfig/retinanet_R_50_FPN_1x.py")
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    message = "config.yaml is of a run of a LazyConfig, and a YAML config is needed here"
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "config.yaml"), needs=("WEIGHTS",))


def test_augmentation_is_no_matter_where_nothing_is_evaluated(config_file):
    opts = ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "RetinaNet"]
    load_config(config_file, opts, needs=("OUTPUT_DIR",))


def test_datasets_of_a_config(config_file, tmp_path):
    files = str(tmp_path / "a.json"), str(tmp_path)
    opts = ["DATASETS.COCO_FORMAT", [["mine", *files]], "DATASETS.TRAIN", ("mine",)]
    with pytest.raises(ConfigError, match="'mine': its json_file '.*a.json' does not exist"):
        load_config(config_file, opts)
    (tmp_path / "a.json").write_text(json.dumps(coco()))
    with pytest.raises(ConfigError, match="'mine': 2 of 2 images of .*a.json' are not in"):
        load_config(config_file, opts)
    for name in ("1.png", "2.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    for _ in range(2):  # a process may read several configs
        load_config(config_file, opts)
    opts[1][0][1] = str(tmp_path / "." / "x" / ".." / "a.json")  # the same file
    (tmp_path / "x").mkdir()
    load_config(config_file, opts)
    metadata = MetadataCatalog.get("mine")
    assert (metadata.json_file, metadata.image_root) == files
