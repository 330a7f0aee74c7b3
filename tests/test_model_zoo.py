"""The recipes, what overrides make of them, the page that lists them, and LazyConfigs.

What they say is compared with their names, with Detectron2's own configs of the same models, and
with the metadata of the datasets. tests/test_model_families.py trains small ones.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data.small_coco import coco
from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2_models import modules_of_type
from test_configs import NORMS, is_type, norm_layers
from test_model_families import of_deeplab, of_panoptic_deeplab, of_point_rend, of_this_package

import wsbcn_d2
from demo.digits import make_digits_dataset
from wsbcn_d2.config import flatten_config
from wsbcn_d2.engine import ConfigError, load_config
from wsbcn_d2.layers import WeightStandardized

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PAGE = (ROOT / "MODEL_ZOO.md").read_text()

# The models with one recipe per norm, and the schedule of these.
R_CNN = {
    f"COCO-{kind}_rcnn_{backbone}_FPN": schedule
    for kind, schedule in (("InstanceSegmentation/mask", "2x"), ("Detection/faster", "1x"))
    for backbone in ("R_50", "R_101", "X_50_32x4d", "X_101_32x4d")
}
# With all norms, tested in test_configs.py.
MASK_R_50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN"
LVIS = "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN"
MODELS = {
    **{model: schedule for model, schedule in R_CNN.items() if model != MASK_R_50},
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4": "1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5": "1x",
    "COCO-Detection/retinanet_R_50_FPN": "1x",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN": "1x",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50": "1x",
    LVIS: "1x",
    "PascalVOC-Detection/faster_rcnn_R_50_FPN": "17e",
    "PascalVOC-Detection/faster_rcnn_R_50_C4": "17e",
    "Cityscapes/mask_rcnn_R_50_FPN": "65e",
    "Cityscapes/semantic_R_50_FPN": "699e",
    "Cityscapes/deeplab_v3_plus_R_103": "484e",
    "Cityscapes/panoptic_deeplab_R_52": "968e",
    "Misc/cascade_mask_rcnn_R_50_FPN": "1x",
    "Misc/mask_rcnn_R_50_FPN_dconv_c3-c5": "1x",
    "Misc/mask_rcnn_R_50_FPN_mdconv_c3-c5": "1x",
    "Misc/pointrend_rcnn_R_50_FPN": "1x",
    "Misc/scratch_mask_rcnn_R_50_FPN": "3x",
}
RECIPES = ("gn_ws", "bcn_ws")

# Thousands of images seen at the decays and at the end.
SEEN = {
    "1x": (960, 1280, 1440),
    "2x": (2400, 2720, 2880),
    "3x": (3360, 4000, 4320),
    # 7,330 batches of 16 images make an epoch
    "20-23-24e": (2345.6, 2697.44, 2814.72),
    "17e": (192, 256, 288),
    "65e": (144, 192),
    "699e": (1280, 1760, 2080),
    "484e": (1440,),
    "968e": (2880,),
}
EPOCH = {"17e": 16551, "65e": 2975, "699e": 2975, "484e": 2975, "968e": 2975}
LEARNING_RATES = {  # for 16 images; the others have 0.02
    "COCO-Detection/retinanet_R_50_FPN": 0.01,
    "Cityscapes/semantic_R_50_FPN": 0.005,
    "Cityscapes/deeplab_v3_plus_R_103": 0.01,
    "Cityscapes/panoptic_deeplab_R_52": 0.0005,
}


def path_of(model, norm="gn_ws"):
    return CONFIGS / f"{model}_{norm}_{MODELS[model]}_1img.yaml"


def load(path):
    cfg = get_cfg()
    add_config = of_this_package
    if "pointrend" in path.stem:
        add_config = of_point_rend
    elif "panoptic_deeplab" in path.stem:
        add_config = of_panoptic_deeplab
    elif "deeplab" in path.stem:
        add_config = of_deeplab
    add_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def seen(cfg):
    """Thousands of images at the decays and at the end."""
    solver = cfg.SOLVER
    steps = [] if solver.LR_SCHEDULER_NAME == "WarmupPolyLR" else solver.STEPS
    return [solver.IMS_PER_BATCH * i / 1000 for i in (*steps, solver.MAX_ITER)]


def scaled(cfg, gpus, images_per_gpu):
    """What Detectron2's trainer makes of the key that MODEL_ZOO.md tells to set."""
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8 // images_per_gpu
    return DefaultTrainer.auto_scale_workers(cfg, gpus)


def documented(key):
    """The arguments that MODEL_ZOO.md has, from a key on."""
    (arguments,) = re.findall(rf"`({re.escape(key)} .*?)`", PAGE)
    return shlex.split(arguments)


def test_every_recipe_is_there():
    expected = {path_of(model, norm) for model in MODELS for norm in RECIPES}
    found = set(CONFIGS.rglob("*_[0-9]img.yaml"))
    of_mask_r_50 = set((CONFIGS / MASK_R_50).parent.glob("mask_rcnn_R_50_FPN_*"))
    assert expected == found - of_mask_r_50


@pytest.mark.parametrize("model", MODELS)
def test_config_is_what_its_name_says(model):
    for norm in RECIPES:
        path = path_of(model, norm)
        cfg = load(path)
        # The norm, everywhere.
        norms = {k: v for k, v in flatten_config(cfg.MODEL).items() if k.endswith(".NORM")}
        assert len(norms) >= 4
        if "DC5" in model:  # fully connected layers have none
            assert norms.pop("ROI_BOX_HEAD.NORM") == ""
        for key, value in norms.items():
            if "v3_plus" in model and key == "SEM_SEG_HEAD.NORM":  # has layers of 48 channels
                value = value.replace("(groups=16)", "")
            assert value == NORMS[norm][0], f"{path}: {key}"

        # The schedule.
        schedule = MODELS[model]
        images = [x * (2 if model == LVIS else 1) for x in SEEN[schedule]]
        assert seen(cfg) == pytest.approx(images), path
        if schedule in EPOCH:
            assert round(1000 * images[-1] / EPOCH[schedule]) == int(schedule[:-1]), path
        rate = LEARNING_RATES.get(model, 0.02) / 16
        assert cfg.SOLVER.IMS_PER_BATCH == 8
        assert cfg.SOLVER.BASE_LR == pytest.approx(8 * rate), path

        # And with other images per GPU.
        for gpus, per_gpu in ((8, 2), (1, 1), (2, 8)):
            other = scaled(cfg.clone(), gpus, per_gpu)
            assert other.SOLVER.IMS_PER_BATCH == gpus * per_gpu
            assert other.SOLVER.BASE_LR == pytest.approx(gpus * per_gpu * rate)
            assert seen(other) == pytest.approx(images), path

        # Random weights, and the input of those that others have for these models.
        mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        assert cfg.INPUT.FORMAT == "RGB" and mean[0] > mean[2] and min(std) > 57, path
        assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1, path
        assert not cfg.MODEL.WEIGHTS and cfg.MODEL.BACKBONE.FREEZE_AT == 0, path
        if "scratch" in path.stem:
            assert cfg.MODEL.WSBCN.UPDATE_RATE_WARMUP, path


@pytest.mark.parametrize("model", MODELS)
def test_recipes_differ_in_the_norm_alone(model):
    """So that another norm is an override of these keys."""
    configs = [flatten_config(load(path_of(model, norm))) for norm in RECIPES]
    differing = {key for key, value in configs[0].items() if configs[1][key] != value}
    assert differing and all(key.endswith(".NORM") for key in differing)


@pytest.mark.parametrize(
    "model, further",
    [
        ("COCO-InstanceSegmentation/mask_rcnn_X_101_32x4d_FPN", []),
        ("PascalVOC-Detection/faster_rcnn_R_50_C4", []),
        ("COCO-Detection/retinanet_R_50_FPN", ["MODEL.RETINANET.NORM", "GN"]),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50", ["MODEL.SEM_SEG_HEAD.NORM", "GN"]),
    ],
)
def test_another_norm_by_the_documented_keys(model, further):
    assert not further or f"`{further[0]}`" in PAGE
    opts = [*documented("MODEL.RESNETS.NORM"), *further, "MODEL.DEVICE", "meta"]
    with torch.device("meta"):
        network = build_model(load_config(str(path_of(model, "bcn_ws")), opts, needs=()))
    norms = norm_layers(network)
    assert len(norms) >= 53 and all(is_type(norm, torch.nn.GroupNorm) for norm in norms)
    assert not modules_of_type(network, WeightStandardized)


@pytest.mark.parametrize("backbone", ["R_101", "X_50_32x4d"])
def test_another_schedule_by_the_documented_keys(backbone):
    path = path_of(f"COCO-InstanceSegmentation/mask_rcnn_{backbone}_FPN")
    cfg = load_config(str(path), documented("SOLVER.STEPS"), needs=())
    assert seen(cfg) == pytest.approx(SEEN["20-23-24e"])


@pytest.mark.parametrize("model", MODELS)
def test_programs_read_it(model):
    of_a_project = "pointrend" in model or "deeplab" in model
    for path in (path_of(model, norm) for norm in RECIPES):
        if of_a_project:
            with pytest.raises(ConfigError, match=f"{path.name}.*docs/in_your_project.md"):
                load_config(str(path), needs=())
        else:
            load_config(str(path), needs=())


CLASSES = {  # key below MODEL -> which classes of the dataset it counts
    "GeneralizedRCNN": [("ROI_HEADS", "thing_classes")],
    "PanopticFPN": [("ROI_HEADS", "thing_classes"), ("SEM_SEG_HEAD", "stuff_classes")],
    "RetinaNet": [("RETINANET", "thing_classes")],
    "SemanticSegmentor": [("SEM_SEG_HEAD", "stuff_classes")],
    "PanopticDeepLab": [("SEM_SEG_HEAD", "stuff_classes")],
}


@pytest.mark.parametrize("model", MODELS)
def test_number_of_classes_is_that_of_the_dataset(model):
    cfg = load(path_of(model))
    for name in cfg.DATASETS.TRAIN + cfg.DATASETS.TEST:
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        for section, classes in CLASSES[cfg.MODEL.META_ARCHITECTURE]:
            assert cfg.MODEL[section].NUM_CLASSES == len(metadata.get(classes))


# The config of Detectron2 for the same model.
MASK, DETECTION = "COCO-InstanceSegmentation/mask_rcnn_R_50_", "COCO-Detection/"
DETECTRON2 = {
    **{MASK + kind: f"{MASK}{kind}_1x.yaml" for kind in ("FPN", "C4", "DC5")},
    **{
        model: f"{model}_1x.yaml"
        for model in (
            "COCO-Detection/faster_rcnn_R_50_FPN",
            "COCO-Detection/retinanet_R_50_FPN",
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN",
            "COCO-PanopticSegmentation/panoptic_fpn_R_50",
            LVIS,
            "Misc/cascade_mask_rcnn_R_50_FPN",
        )
    },
    **{
        model: f"{model}.yaml"
        for model in (
            "PascalVOC-Detection/faster_rcnn_R_50_FPN",
            "PascalVOC-Detection/faster_rcnn_R_50_C4",
            "Cityscapes/mask_rcnn_R_50_FPN",
        )
    },
    "Misc/mask_rcnn_R_50_FPN_dconv_c3-c5": "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
    "Misc/scratch_mask_rcnn_R_50_FPN": "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
}


@pytest.mark.parametrize("model", DETECTRON2)
def test_nothing_else_differs_from_the_config_of_detectron2(model):
    """With the images per GPU of Detectron2's, that is with 2 of them."""
    stock = flatten_config(model_zoo.get_config(DETECTRON2[model]))
    images = stock["SOLVER.IMS_PER_BATCH"] // 8
    path = CONFIGS / f"{model}_gn_ws_{MODELS.get(model, '1x')}_1img.yaml"
    ours = flatten_config(scaled(load(path), 8, images))
    differing = {key for key, value in stock.items() if ours[key] != value}
    if "ANCHOR_GENERATOR" in str(differing):  # written out, and rounded
        key = "MODEL.ANCHOR_GENERATOR.SIZES"
        torch.testing.assert_close(
            torch.tensor(ours[key]), torch.tensor(stock[key]), rtol=0, atol=1e-4
        )
        differing.remove(key)
    input_and_weights = ("WEIGHTS", "PIXEL_MEAN", "PIXEL_STD", "FORMAT", "STRIDE_IN_1X1")
    backbone = ("MODEL.BACKBONE.NAME", "MODEL.BACKBONE.FREEZE_AT")
    box_head = ("MODEL.ROI_BOX_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.NUM_FC")  # 4conv1fc for 2fc
    # The warm-up is as many images, not iterations; what else the batch determines is the default.
    batch = ("WARMUP_ITERS", "CHECKPOINT_PERIOD", "EVAL_PERIOD", "REFERENCE_WORLD_SIZE")
    allowed = ("NORM", *input_and_weights, *batch)
    names = {key for key in differing if key.rpartition(".")[2] not in allowed}
    assert names <= {*backbone, *box_head}


@pytest.mark.parametrize("model", R_CNN)
def test_full_size(model):
    """On the meta device: nothing is computed."""
    cfg = load(CONFIGS / f"{model}_bcn_ws_{R_CNN[model]}_1img.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        network = build_model(cfg)
    convolutions = 104 if "_101" in model else 53  # stem, 3 a block, 4 shortcuts
    convolutions += 8 + 4 + 4 * ("mask" in model)  # FPN, box head, mask head
    assert len(modules_of_type(network, WeightStandardized)) == convolutions
    norms = norm_layers(network)
    assert len(norms) == convolutions
    assert all(is_type(norm, wsbcn_d2.BatchChannelNorm) for norm in norms)
    groups, width = (32, 128) if "_X_" in model else (1, 64)
    conv = network.backbone.bottom_up.res2[0].conv2
    assert (conv.groups, conv.out_channels) == (groups, width)


# -------------------------------------------------------------------------------------- the tools


def test_page_is_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["list_model_zoo.py", "--check"])
    with pytest.raises(SystemExit) as result:
        runpy.run_path(str(ROOT / "tools" / "list_model_zoo.py"), run_name="__main__")
    assert result.value.code == 0, "run tools/list_model_zoo.py"


def test_configs_and_results_that_are_not_listed_are_errors(tmp_path, monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools" / "list_model_zoo.py"))
    (tmp_path / "COCO").mkdir()
    (tmp_path / "COCO" / "mask_rcnn_xn_1x_1img.yaml").touch()
    with pytest.raises(ValueError, match="mask_rcnn_xn_1x_1img.yaml: the name must be MODEL_NORM"):
        tool["find_configs"](tmp_path)
    published = tmp_path / "published.yaml"
    monkeypatch.setitem(tool["page"].__globals__, "PUBLISHED", published)
    for key, message in (
        ("COCO-Detection/faster_rcnn_R_50_FPN_3x", "there is no config for COCO-Detection/faster"),
        (f"{MASK_R_50}_1x", "mask_rcnn_R_50_FPN has no config with LN"),
    ):
        entry = "{norm: LN, source: me, batch: 8, box AP: 40}"
        published.write_text(f"sources: {{}}\nresults:\n  {key}: [{entry}]\n")
        with pytest.raises(ValueError, match=message):
            tool["page"]()


def test_page_lists_every_config():
    listed = set(re.findall(r"\]\((configs/[\w/.-]+)\)", PAGE))
    files = {p for p in CONFIGS.rglob("*.*") if p.suffix in (".yaml", ".py")}
    files = {p for p in files if not p.name.startswith("Base-") and "_base_" not in p.parts}
    files.discard(CONFIGS / "LazyConfig" / "common.py")
    assert listed == {str(path.relative_to(ROOT)) for path in files}


# ------------------------------------------------------------------------------------ LazyConfigs

LAZY = sorted(path.name for path in (CONFIGS / "LazyConfig").glob("*_1x.py"))


@pytest.mark.parametrize("name", LAZY)
def test_norm_of_a_lazy_config(name):
    cfg = LazyConfig.load(str(CONFIGS / "LazyConfig" / name))
    assert cfg.dataloader.train.total_batch_size == 8 and cfg.train.max_iter == 180000
    assert cfg.dataloader.train.mapper.image_format == "RGB"
    layers = {}
    for norm, option in (("gn", "GN"), ("bcn_ws", "BCN+WS")):
        cfg = LazyConfig.apply_overrides(cfg, [f"train.norm={option}"])
        with torch.device("meta"):
            model = instantiate(cfg.model)
        norms = norm_layers(model)
        assert all(is_type(layer, NORMS[norm][1]) for layer in norms)
        layers[norm] = len(norms)
        standardized = modules_of_type(model, WeightStandardized)
        assert len(standardized) == (len(norms) if norm == "bcn_ws" else 0)
    assert layers["gn"] == layers["bcn_ws"] >= 53


RETINANET = str(CONFIGS / "LazyConfig" / "retinanet_R_50_FPN_1x.py")


def run_lazyconfig(arguments, datasets):
    command = [sys.executable, str(ROOT / "tools" / "lazyconfig_train_net.py"), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(datasets)}
    return subprocess.run(command, env=env, text=True, capture_output=True)


LAZY_CONFIG = """
from detectron2.config import LazyConfig
from detectron2.data.datasets import register_coco_instances

for split in ("train", "val"):
    file = f"{folder}/annotations/instances_{{split}}.json"
    register_coco_instances(f"digits_{{split}}", {{}}, file, f"{folder}/{{split}}")
cfg = LazyConfig.load("{file}")
dataloader, model, optimizer, train = cfg.dataloader, cfg.model, cfg.optimizer, cfg.train
lr_multiplier = cfg.lr_multiplier
"""


def test_training_from_a_lazy_config(tmp_path):
    make_digits_dataset(
        str(tmp_path / "digits"), num_train=2, num_val=2, image_size=64, progress=False
    )
    config = tmp_path / "config.py"
    config.write_text(LAZY_CONFIG.format(file=RETINANET, folder=tmp_path / "digits"))
    mapper = "mapper.augmentations.0.short_edge_length"
    arguments = [
        "--config-file",
        str(config),
        "dataloader.train.dataset.names=digits_train",
        "dataloader.test.dataset.names=digits_val",
        "dataloader.train.total_batch_size=1",
        *(f"dataloader.{part}.num_workers=0" for part in ("train", "test")),
        f"dataloader.train.{mapper}=[64]",
        f"dataloader.test.{mapper}=64",
        "model.num_classes=10",
        "train.max_iter=2",
        "train.log_period=1",
        "train.wsbcn.UPDATE_RATE_WARMUP=True",
        "train.wsbcn.CHECKPOINT_ACTIVATIONS=all",
        f"train.output_dir={tmp_path / 'out'}",
    ]
    result = run_lazyconfig(arguments, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    first, second, last = map(json.loads, lines)
    assert (first["bcn_update_rate"], second["bcn_update_rate"]) == (1.0, 0.5)
    assert "bbox/AP" in last
    assert re.search("checkpointing of 'all': .*16 FusedBottleneckBlock", result.stdout)
    assert (tmp_path / "out" / "model_final.pth").is_file()

    # of the checkpoint of the run, not of random weights
    result = run_lazyconfig([*arguments[:2], "--eval-only", "--resume", *arguments[2:]], tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "out/model_final.pth" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: --config-file must name a LazyConfig"),
        (
            ["--config-file", RETINANET, "--eval-only"],
            "error: train.init_checkpoint is empty, and must name the checkpoint",
        ),
        (
            ["--config-file", RETINANET, "train.wsbcn.ZERO_INIT_RESIDUAL=True"],
            "error: there is no train.wsbcn.ZERO_INIT_RESIDUAL; allowed are CHECKPOINT_ACTIV",
        ),
        (["--config-file", RETINANET], "error: dataloader.train: dataset 'coco_2017_train': its"),
        (
            ["--config-file", RETINANET, "train.norm=BNC"],
            "error: the model of the config cannot be built: unknown norm option 'BNC'",
        ),
        (
            ["--config-file", RETINANET, "train.norm=BCN(groups=48)+WS"],
            "error: the model of the config cannot be built: norm option 'BCN(groups=48)+WS': 64",
        ),
        (["--config-file", "a.yaml"], "error: a.yaml is not a LazyConfig (.py); YAML configs are"),
        (
            ["--config-file", RETINANET, "train.nrom=GN"],
            "error: the config has no key train.nrom; close to it are train.norm",
        ),
        (
            ["--config-file", RETINANET, "train.wsbcn.SYNC_PERIOD=abc"],
            "error: train.wsbcn.SYNC_PERIOD: Type mismatch",
        ),
        (
            ["--config-file", RETINANET, f"train.output_dir={__file__}"],
            "error: train.output_dir: cannot write",
        ),
        (["--config-file", RETINANET, "train.norm=(GN"], "error: train.norm=(GN: "),
        (
            ["--config-file", RETINANET, "train.a.b=1"],
            "error: the config has no key train.a.b; close to",
        ),
        (["--config-file", RETINANET, "~train"], "error: ~train: "),
        (
            [
                *("--config-file", RETINANET, "train.ddp.static_graph=True", "+train.a=1"),
                *("train.seed=1", "model.head.norm=BCN+SW", "model.backbone.bottom_up.a=2"),
            ],
            "error: the model of the config cannot be built: ",
        ),
    ],
    ids=[
        *("no config", "no weights", "no such key", "no data", "no such norm", "groups", "yaml"),
        *("misspelt", "no number", "no folder", "no override"),
        *("new node", "deleted", "new keys"),
    ],
)
def test_errors_of_lazy_configs_are_one_line(
    tmp_path, monkeypatch, capsys, arguments, message, register
):
    if "the model of the config" in message:  # which is built when the data is there
        name = register(coco())
        arguments = [
            *arguments,
            *(f"dataloader.{p}.dataset.names={name}" for p in ("train", "test")),
        ]
    folder = tmp_path / "without data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lazyconfig_train_net.py", *arguments])
    with pytest.raises(SystemExit) as result:
        runpy.run_path(str(ROOT / "tools" / "lazyconfig_train_net.py"), run_name="__main__")
    assert result.value.code == 2 and list(folder.iterdir()) == []
    *_, error = capsys.readouterr().err.splitlines()
    assert message in error


@pytest.mark.parametrize(
    "path, key",
    [
        ("Misc/pointrend_rcnn_R_50_FPN_bcn_ws_1x_1img.yaml", "POINT_HEAD"),
        ("Cityscapes/deeplab_v3_plus_R_103_gn_ws_484e_1img.yaml", "SEM_SEG_HEAD.ASPP_DILATIONS"),
    ],
)
def test_configs_of_projects_have_their_keys(path, key):
    cfg = wsbcn_d2.model_zoo.get_config(path)
    assert any(k.startswith(f"MODEL.{key}") for k in flatten_config(cfg))
    assert "WSBCN" in cfg.MODEL


def test_project_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2.projects.point_rend", None)
    path = "Misc/Base-PointRend-RCNN-FPN.yaml"
    with pytest.raises(ConfigError, match=rf"{path} has keys .*point_rend cannot be imported: "):
        wsbcn_d2.model_zoo.get_config(path)


# ------------------------------------------------------------------------------------------- docs


def snippets():
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/in_your_project.md").read_text(), re.S)


@pytest.mark.parametrize("index", range(3), ids=["strings", "convert", "by hand"])
def test_ways_into_a_project(index):
    assert len(snippets()) == 3
    exec(snippets()[index], {})
