"""Datasets that do not fit one another, or the model, are found before anything is built."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data.small_coco import coco
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.engine import DefaultTrainer

from wsbcn_d2 import add_wsbcn_config
from wsbcn_d2.engine import ConfigError, Trainer, load_config
from wsbcn_d2.engine.data import check_data


def config(train=(), test=(), *opts):
    cfg = get_cfg()
    add_wsbcn_config(cfg)
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test)),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
            *opts,
        ]
    )
    return cfg


def refused(cfg, *parts):
    with pytest.raises(ConfigError) as info:
        check_data(cfg, *parts)
    assert "\n" not in str(info.value)
    return str(info.value)


RENUMBERED = coco()
for category in RENUMBERED["categories"]:
    category["id"] = 3 - category["id"]
for entry in RENUMBERED["annotations"]:
    entry["category_id"] = 3 - entry["category_id"]


@pytest.mark.parametrize(
    "other, difference",
    [
        (RENUMBERED, "dog, cat: they are in another order"),
        (coco(classes=("dog",)), "dog: '{}' lacks cat"),
        (coco(classes=("cat", "dog", "cow")), "cat, dog, cow: '{train}' lacks cow"),
        (coco(classes=("cat", "dog ")), "cat, 'dog ': '{train}' lacks 'dog ', '{}' lacks dog"),
        (coco(classes=("cat", "Dog")), "cat, Dog: '{train}' lacks Dog, '{}' lacks dog"),
    ],
)
def test_classes_of_training_and_test_data(register, other, difference):
    train, test = register(coco()), register(other)
    message = refused(config([train], [test]))
    expected = f"the thing_classes of '{train}' are cat, dog, and those of '{test}' "
    assert message.startswith(expected + difference.format(test, train=train))
    # of two training or test sets, too
    assert difference.format(test, train=train) in refused(config([train, test]))
    assert difference.format(test, train=train) in refused(config([train], [train, test]))


def test_other_ids_in_the_same_order_are_the_same_classes(register):
    other = coco()
    for category in other["categories"]:
        category["id"] += 16
    for entry in other["annotations"]:
        entry["category_id"] += 16
    check_data(config([register(coco())], [register(other)]))


def test_evaluation_alone_knows_the_classes_of_training_data(register, tmp_path):
    """If it is there; it may be on another machine."""
    train, test = register(coco()), register(RENUMBERED)
    path = MetadataCatalog.get(train).json_file
    assert "in another order" in refused(config([train], [test]), ["TEST"])
    vars(MetadataCatalog.get(train))["json_file"] = path + ".gone"
    check_data(config([train, "not_registered"], [test]), ["TEST"])
    assert "not_registered" not in MetadataCatalog.list()


def test_classes_of_semantic_segmentation(register):
    """Which is of no file in COCO's format."""
    names = [register(coco()), register(coco())]
    for name, stuff in zip(names, (["sky", "sea"], ["sea", "sky"])):
        metadata = MetadataCatalog.get(name)
        vars(metadata)["evaluator_type"] = "sem_seg"
        metadata.stuff_classes = stuff
    message = refused(config(names[:1], names[1:]))
    assert message.startswith(f"the stuff_classes of '{names[0]}' are sky, sea, and those of")


def test_number_of_classes(register):
    name = register(coco(classes=("a", "b", "c")))
    assert "NUM_CLASSES is 2, but" in refused(config([name]))
    assert "has 3 (a, b, c)" in refused(config([], [name]), ["TEST"])


def with_first(content, **keys):
    content["annotations"][0].update(keys)
    return content


RLE = {"size": [64, 64], "counts": [0, 100, 3996]}
NO_MASK = {
    "missing": (coco(segmentation=None), "(id 1) has no segmentation"),
    "empty": (coco(segmentation=[]), "(id 1) has no segmentation"),
    "null": (with_first(coco(), segmentation=None), "(id 1) has no segmentation"),
    "mixed": (with_first(coco(), segmentation=RLE), "(id 1) has a run-length encoded mask"),
}


@pytest.mark.parametrize("case", NO_MASK)
def test_masks_that_a_model_of_masks_needs(register, case):
    content, message = NO_MASK[case]
    train, good = register(content), register(coco())
    masks = ["MODEL.MASK_ON", True]
    assert message in refused(config([train], (), *masks))
    check_data(config([train], [train]))
    if case == "mixed":
        assert "INPUT.MASK_FORMAT is 'polygon'" in refused(config([train], (), *masks))
        check_data(config([train], [train], *masks, "INPUT.MASK_FORMAT", "bitmask"))
    else:
        assert message in refused(config([good], [train], *masks))
    # crowds are evaluated with masks, and not trained with
    crowd = register(with_first(content, iscrowd=1) if case == "null" else coco())
    check_data(config([crowd], (), *masks))
    if case == "null":
        assert message in refused(config([good], [crowd], *masks))


def test_test_images_without_annotations(register):
    content = coco()
    del content["annotations"]
    name, train = register(content), register(coco())
    opts = ["MODEL.MASK_ON", True]
    check_data(config([train], [name], *opts))
    assert f"DATASETS.TRAIN: '{name}' have no annotations" in refused(config([name]))
    crowds = register(coco(iscrowd=1))
    assert f"DATASETS.TRAIN: '{crowds}' have no annotations" in refused(config([crowds]))
    check_data(config([crowds, train]))
    # Detectron2 knows the annotations of listed images only, and leaves polygons of a line out.
    crowd_and_stray = with_first(coco(images=1, objects=2), iscrowd=1)
    crowd_and_stray["annotations"][1]["image_id"] = 9
    line = with_first(coco(images=1, objects=1), segmentation=[[1, 1, 5, 5]])
    for content in (crowd_and_stray, line):
        name = register(content)
        cfg = config([name])
        assert f"DATASETS.TRAIN: '{name}' have no annotations" in refused(cfg)
        with pytest.raises(AssertionError, match="No valid data found"):
            DefaultTrainer.build_train_loader(cfg)
    check_data(config([name], (), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False))


def test_images_must_be_there(register):
    name = register(coco())
    (Path(MetadataCatalog.get(name).image_root) / "2.png").unlink()
    assert f"dataset '{name}': 1 of 2 images of" in refused(config([name]))
    assert "the first is '2.png'" in refused(config([], [name]), ["TEST"])


def test_training_needs_a_dataset():
    assert refused(config([])) == "DATASETS.TRAIN is empty, and must name a dataset"
    check_data(config([]), ["TEST"])
    DatasetCatalog.register("own", list)
    with pytest.raises(ConfigError, match="data cannot be loaded: Dataset 'own' is empty"):
        Trainer(config(["own"], (), "MODEL.META_ARCHITECTURE", "none"))


def test_images_with_enough_keypoints(register):
    content = coco(classes=("person",), keypoints=EYES)
    content["annotations"][0]["keypoints"][2::3] = [0, 0, 0]
    name, key = register(content), "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"
    check_data(keypoint_config(name, name, key, 6))
    cfg = keypoint_config(name, name, key, 7)
    assert f"{key} is 7, but in DATASETS.TRAIN, '{name}', no image" in refused(cfg)
    assert "the most are 6" in refused(cfg)
    with pytest.raises(AssertionError, match="No valid data found"):
        DefaultTrainer.build_train_loader(cfg)


# ---------------------------------------------------------------------------------------- keypoints

EYES = ("left_eye", "right_eye", "nose")


def keypoint_config(train, test, *opts):
    """An R-CNN whose iteration takes a moment."""
    return config(
        [train],
        [test],
        *("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 1, "TEST.KEYPOINT_OKS_SIGMAS", [0.05, 0.05, 0.1]),
        *opts,
    )


def test_names_and_sides_of_keypoints_are_taken_from_the_file(register):
    classes = ("person",)
    train = register(coco(classes=classes, keypoints=EYES))
    test = register(coco(classes=classes, keypoints=EYES))
    check_data(keypoint_config(train, test))
    metadata = MetadataCatalog.get(train)
    assert metadata.keypoint_names == list(EYES)
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]


@pytest.mark.parametrize(
    "names, pairs",
    [
        (("L-Ear", "R-Ear", "x"), [("L-Ear", "R-Ear")]),
        (("EYE_LEFT", "x", "EYE_RIGHT"), [("EYE_LEFT", "EYE_RIGHT")]),
        (("left_eye", "x", "y"), None),  # its counterpart has another name
        (("a", "b", "c"), None),
    ],
)
def test_flip_map_is_asked_for_only_where_it_is_needed(register, names, pairs):
    train = register(coco(classes=("a",), keypoints=names))
    cfg = keypoint_config(train, train)
    if pairs is None:
        assert "KEYPOINT_FLIP_MAP is empty, and the names" in refused(cfg)
        check_data(keypoint_config(train, train, "INPUT.RANDOM_FLIP", "none"))
        assert "KEYPOINT_FLIP_MAP is empty" in refused(cfg)  # again
        check_data(cfg, ["TEST"])
        pairs = [names[:2]]
        cfg = keypoint_config(train, train, "DATASETS.KEYPOINT_FLIP_MAP", tuple(pairs))
        other = ["DATASETS.KEYPOINT_FLIP_MAP", (("a", "z"),)]
        assert "('a', 'z') is not a pair of names" in refused(keypoint_config(train, train, *other))
    check_data(cfg)
    assert MetadataCatalog.get(train).keypoint_flip_map == pairs


def test_one_flip_map_for_all_datasets(register):
    """As Detectron2 wants it: one registered, one from the file."""
    pairs = (("left_eye", "right_eye"),)
    first = register(coco(classes=("a",), keypoints=EYES), keypoint_flip_map=pairs)
    second = register(coco(classes=("a",), keypoints=EYES))
    cfg = keypoint_config(first, second, "DATASETS.TRAIN", (first, second))
    check_data(cfg)
    assert len(create_keypoint_hflip_indices([first, second])) == len(EYES)


def test_keypoints_that_do_not_fit(register):
    def of(names, **keys):
        return register(with_first(coco(classes=("a",), keypoints=names), **keys))

    good, bare = of(EYES), register(coco(classes=("a",)))
    key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 3, but"
    four, other = of((*EYES, "tail")), of(EYES[::-1])
    assert key in refused(keypoint_config(four, good))
    assert key in refused(keypoint_config(good, four))
    assert "keypoints of" in refused(keypoint_config(good, other))
    assert "nose, right_eye, left_eye; they must be the same" in refused(
        keypoint_config(good, other)
    )
    for name in (bare, of(EYES, keypoints=[])):
        assert "lacks 3 keypoints" in refused(keypoint_config(name, good))
    assert "every annotation lacks 3" in refused(keypoint_config(good, bare))
    check_data(keypoint_config(good, of(EYES, keypoints=[])))
    assert "(id 2) lacks 3" in refused(keypoint_config(good, of_other_length(register)))
    for sigmas in ([], [0.1, 0.1]):
        message = refused(keypoint_config(good, good, "TEST.KEYPOINT_OKS_SIGMAS", sigmas))
        assert message.startswith("TEST.KEYPOINT_OKS_SIGMAS: there must be 3, as many as")


def of_other_length(register):
    content = coco(classes=("a",), keypoints=EYES)
    content["annotations"][1]["keypoints"] = [1, 1, 2] * 2
    return register(content)


def test_keypoints_train_and_evaluate(register, tmp_path):
    """With a skeleton of three, through the command's own way."""
    content = coco(classes=("person",), keypoints=EYES, segmentation=None, area=None, iscrowd=None)
    for entry in content["annotations"]:
        entry["bbox"] = [4, 4, 50, 50]
    name = register(content)
    source = MetadataCatalog.get(name)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(
        keypoint_config(
            "mine",
            "mine",
            *("OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()),
            *("DATASETS.COCO_FORMAT", (("mine", source.json_file, source.image_root),)),
            *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64),
            *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"], "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7, "DATALOADER.NUM_WORKERS", 0),
            *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,), "SOLVER.IMS_PER_BATCH", 1),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
        ).dump()
    )
    try:
        trainer = Trainer(load_config(str(config_file)))
        trainer.resume_or_load(resume=False)
        trainer.train()
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")
    results = trainer._last_eval_results
    assert {"bbox", "keypoints"} == set(results)
    assert np.isfinite(results["keypoints"]["AP"])


def test_a_step_at_the_last_iteration(register, tmp_path):
    """Which has no effect; Detectron2 asks for fewer."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    rates = {}
    for steps in ((2, 4), (2,), (2, 4, 9)):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        opts = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", steps, "SOLVER.WARMUP_ITERS", 0]
        scheduler = Trainer.build_lr_scheduler(config([], [], *opts), optimizer)
        rates[steps] = []
        for _ in range(4):
            rates[steps].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[2, 4] == rates[(2,)] == rates[2, 4, 9] == pytest.approx([1, 1, 0.1, 0.1])


def test_trainer_looks_at_its_data_before_it_builds_a_model(register, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: pytest.fail("a model is built"))
    cfg = config([register(coco())], [register(RENUMBERED)], "OUTPUT_DIR", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="in another order"):
        Trainer(cfg)
    assert not (tmp_path / "out").exists()
