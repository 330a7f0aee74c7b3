"""Pretraining of the backbone on crops of digits, and what a detector makes of its weights."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2_models import logged

from demo import digit_crops, digits, pretraining
from demo.digit_crops import DigitCrops
from demo.digits import make_digits_dataset
from demo.pretraining import large_batch_form, pretrain_backbone
from wsbcn_d2.engine import load_config
from wsbcn_d2.engine.statistics import named_batch_channel_norms

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "Digits-InstanceSegmentation"
NO_DATA = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"]
# 32 groups need at least 32 channels everywhere.
NARROW = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]
TINY = dict(steps=3, batch_size=4, crop_size=32, eval_crops=8)


def config(norm, *opts):
    if norm == "frozenbn":  # has no file
        norm, opts = "bn", ["MODEL.RESNETS.NORM", "FrozenBN", *opts]
    return load_config(
        str(CONFIGS / f"mask_rcnn_R_18_FPN_{norm}.yaml"), [*NO_DATA, *NARROW, *opts], needs=()
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Config, checkpoint and trained classifier of each norm, made when asked for."""
    made = {}
    evaluate = pretraining._evaluate

    def get(norm):
        if norm not in made:
            cfg, models = config(norm), []
            path = str(tmp_path_factory.mktemp("pretraining") / f"{norm}.pth")
            with pytest.MonkeyPatch.context() as patch:
                # to look at the classifier, which is not part of the result
                patch.setattr(
                    pretraining, "_evaluate", lambda m, b: models.append(m) or evaluate(m, b)
                )
                result = pretrain_backbone(cfg, path, **TINY)
            made[norm] = cfg, path, models[0], result
        return made[norm]

    return get


def bottom_up_keys(model):
    return {key for key in model.state_dict() if key.startswith("backbone.bottom_up.")}


class TestCrops:
    def test_splits_share_no_digit(self):
        crops = {split: DigitCrops(split, 1500) for split in digits.SPLITS}
        ids = {split: {crops[split].sample_id(i) for i in range(1500)} for split in crops}
        assert len(ids["train"]) > 700 and len(ids["val"]) > 350
        assert ids["train"].isdisjoint(ids["val"])

    def test_splits_are_those_of_the_dataset(self, tmp_path):
        root = make_digits_dataset(
            str(tmp_path / "digits"), num_train=20, num_val=60, image_size=64, progress=False
        )
        with open(digits.annotation_file(root, "val")) as file:
            in_dataset = {a["sample_id"] for a in json.load(file)["annotations"]}
        crops = DigitCrops("train", 3000)
        in_crops = {crops.sample_id(i) for i in range(3000)}
        assert in_dataset and in_dataset.isdisjoint(in_crops)

    def test_labels_are_those_of_the_samples(self):
        from sklearn.datasets import load_digits

        crops = DigitCrops("val", 30, 32)
        for i in range(30):
            image, label = crops[i]
            assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
            assert label == load_digits().target[crops.sample_id(i)]

    @pytest.mark.parametrize("crop_size", [32, 48, 77])
    def test_the_largest_digits_fit(self, crop_size, monkeypatch):
        """Full squares at the extremes of everything that makes a digit large."""
        monkeypatch.setattr(digits, "_WIDTH_STRETCH", digits._WIDTH_STRETCH[1:] * 2)
        monkeypatch.setattr(digit_crops, "_RELATIVE_HEIGHT", digit_crops._RELATIVE_HEIGHT[1:] * 2)
        crops = DigitCrops("train", 100, crop_size)
        inks = np.full_like(crops._material.inks, 16)
        crops._material = crops._material._replace(inks=inks)
        assert all(image.shape == (3, crop_size, crop_size) for image, _ in crops)

    def test_easy_ones_first(self):
        """Crop i is a blend of a white digit on black and the crop without ease."""
        easy, hard = DigitCrops("train", 100, 32, easy_fraction=0.8), DigitCrops("train", 100, 32)
        contrasts = []
        for i in range(100):
            (image, label), (reference, expected) = easy[i], hard[i]
            assert label == expected
            if i >= 80:
                assert torch.equal(image, reference)
            else:
                # of the photograph, at the corners that the digit does not reach
                corners, references = (x[:, ::31, ::31].flatten(1) for x in (image, reference))
                ratio = corners.float() / references.clamp(min=1)
                contrasts.append(ratio[:, references.amin(0) > 100].median())
        contrasts = torch.tensor(contrasts)
        known = ~contrasts.isnan()
        least = torch.arange(80) / 80
        assert known.sum() > 20 and contrasts[:20][known[:20]].min() < 0.5
        assert (contrasts > least - 0.02)[known].all()

    def test_reproducible(self):
        first, second, other = (DigitCrops("train", 9, 32, seed) for seed in (3, 3, 4))
        assert torch.equal(first[5][0], second[5][0])
        assert not torch.equal(first[5][0], other[5][0])
        assert not torch.equal(first[5][0], first[6][0])
        assert not torch.equal(first[5][0], DigitCrops("val", 9, 32, 3)[5][0])

    @pytest.mark.parametrize(
        "arguments,message",
        [
            (("test", 1), "split is 'test'; it must be one of train, val"),
            (("val", 0), "num_crops is 0"),
            (("val", 1, 31), "crop_size is 31"),
            (("val", 1, 32, -1), "seed is -1"),
            (("val", 1, 32, 0, 1.5), "easy_fraction is 1.5; it must be from 0 to 1"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DigitCrops(*arguments)

    def test_no_crop_beyond_the_last(self):
        assert len(list(DigitCrops("val", 2, 32))) == 2


class TestCheckpoint:
    @pytest.mark.parametrize("norm", ["bcn_ws", "gn_ws", "bn", "frozenbn"])
    def test_is_the_backbone_of_the_detector(self, pretrained, norm):
        cfg, path, classifier, _ = pretrained(norm)
        torch.manual_seed(7)
        detector = build_model(cfg).eval()
        before = {key: value.clone() for key, value in detector.state_dict().items()}
        saved = torch.load(path, weights_only=True)["model"]
        assert set(saved) == bottom_up_keys(detector)

        with logged("detectron2.wsbcn_d2", "fvcore.common.checkpoint") as messages:
            DetectionCheckpointer(detector).load(path)
        # what it says is missing are FPN and heads
        assert not any("weight standardization" in message for message in messages)
        assert not any("bottom_up" in message for message in messages)
        assert not any("in the checkpoint but not" in message for message in messages)
        for key, value in detector.state_dict().items():
            if key in saved:
                assert torch.equal(value, saved[key]), key
            else:  # Detectron2 moves FrozenBN's initial 1 - eps to 1
                torch.testing.assert_close(value, before[key])

        # in float64, as FrozenBN and BN round differently
        detector, classifier = detector.double(), copy.deepcopy(classifier).double()
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        x = (images - detector.pixel_mean) / detector.pixel_std
        features = detector.backbone.bottom_up(x)
        logits = classifier(images)
        for name, feature in classifier.bottom_up(x).items():
            torch.testing.assert_close(features[name], feature)
        # ... and the classifier sees images as the detector does
        pooled = features["res5"].mean((2, 3))
        scaled = classifier.center(pooled) / pooled.shape[1] ** 0.5
        torch.testing.assert_close(logits, classifier.predict(scaled))

    def test_estimates_are_trained(self, pretrained):
        cfg, path, classifier, result = pretrained("bcn_ws")
        assert result.norm == "BatchBCN+WS"
        detector = build_model(cfg)
        assert {layer.mode for _, layer in named_batch_channel_norms(detector)} == {"estimate"}
        assert {layer.mode for _, layer in named_batch_channel_norms(classifier)} == {"batch"}
        DetectionCheckpointer(detector).load(path)
        layers = list(named_batch_channel_norms(detector.backbone.bottom_up))
        convolutions = [m for m in classifier.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(layers) == len(convolutions)
        for name, layer in layers:
            assert (layer.running_mean != 0).all() and (layer.running_var != 1).all(), name

    def test_everything_is_trained(self, pretrained):
        cfg, path, *_ = pretrained("gn_ws")
        start = pretraining._state_of_backbone(pretraining._build(cfg, seed=0))
        saved = torch.load(path, weights_only=True)["model"]
        unchanged = {key for key in saved if torch.equal(saved[key], start[key])}
        assert unchanged == {key for key in saved if key.endswith("ws_eps")}

    def test_reproducible_and_seeded(self, pretrained, tmp_path):
        cfg, path, _, result = pretrained("gn_ws")
        state = torch.random.get_rng_state()
        again = pretrain_backbone(cfg, str(tmp_path / "again.pth"), **TINY)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (again.loss, again.accuracy) == (result.loss, result.accuracy)
        first, second = (
            torch.load(p, weights_only=True)["model"] for p in (path, tmp_path / "again.pth")
        )
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        other = pretrain_backbone(cfg, str(tmp_path / "other.pth"), seed=1, **TINY)
        assert other.loss != result.loss

    def test_a_frozen_backbone_is_trained_too(self, tmp_path):
        cfg = config("gn", "MODEL.BACKBONE.FREEZE_AT", "2")
        pretrain_backbone(cfg, str(tmp_path / "out.pth"), **{**TINY, "steps": 1})
        start = pretraining._state_of_backbone(pretraining._build(cfg, seed=0))
        saved = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
        assert not any(torch.equal(saved[key], start[key]) for key in saved if "weight" in key)


@pytest.mark.parametrize("norm", ["bcn_ws", "gn"])
def test_it_learns(norm):
    """The same few crops again and again."""
    cfg = pretraining._pretraining_config(config(norm), 15, 0.1)
    model = pretraining._build(cfg, seed=0)
    crops = DigitCrops("train", 8, 32)
    images, labels = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in crops)))
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model.train()(images), labels)
    pretraining._train(model, cfg, [(images, labels)] * 15, progress=False)
    with torch.no_grad():
        after = torch.nn.functional.cross_entropy(model.train()(images), labels)
    assert before > 1.5 and after < 0.5


@pytest.mark.parametrize(
    "norm,expected",
    [
        ("BCN+WS", "BatchBCN+WS"),
        ("BCN(groups=16)", "BatchBCN(groups=16)"),
        ("SyncBCN", "BatchBCN"),
        ("FrozenBN+WS", "BN+WS"),
        ("SyncBN", "BN"),
        ("GN(groups=8)+WS", "GN(groups=8)+WS"),
        ("BN", "BN"),
        ("", ""),
    ],
)
def test_large_batch_form(norm, expected):
    assert large_batch_form(norm) == expected


@pytest.mark.parametrize(
    "change,message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"crop_size": 16}, "crop_size is 16"),
        ({"eval_crops": 0}, "num_crops is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_numbers(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pretrain_backbone(config("gn"), str(tmp_path / "out.pth"), **{**TINY, **change})
    assert not any(tmp_path.iterdir())


def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot write '.*': '.*file' is not a folder"):
        pretrain_backbone(config("gn"), str(tmp_path / "file" / "out.pth"), **TINY)


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        pretrain_backbone(
            config("gn"), str(tmp_path / "out.pth"), **{**TINY, "steps": 9}, learning_rate=1e30
        )
    assert not any(tmp_path.iterdir())


def test_command(pretrained, tmp_path):
    _, path, _, result = pretrained("bcn_ws")
    arguments = ["--steps", "3", "--batch-size", "4", "--crop-size", "32", "--eval-crops", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "demo.pretraining", *arguments, "--output", "out.pth"]
        + ["--config-file", str(CONFIGS / "mask_rcnn_R_18_FPN_bcn_ws.yaml")]
        + ["MODEL.DEVICE", "cpu", *NARROW],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # it needs no dataset
            "DETECTRON2_DATASETS": str(tmp_path / "nowhere"),
        },
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    accuracy = f"accuracy {100 * result.accuracy:.1f} % on 8 crops"
    assert last.startswith(f"out.pth: BatchBCN+WS, {accuracy}")
    assert "3/3" in done.stderr  # of the progress bar
    assert [p.name for p in tmp_path.iterdir()] == ["out.pth"]
    made, expected = (
        torch.load(p, weights_only=True)["model"] for p in (tmp_path / "out.pth", path)
    )
    torch.testing.assert_close(made, expected)


def test_error_is_one_line(tmp_path, monkeypatch, capsys):
    config_file = str(CONFIGS / "mask_rcnn_R_18_FPN_gn.yaml")
    arguments = ["--config-file", config_file, "--output", str(tmp_path / "o"), "--steps", "0"]
    monkeypatch.setattr(sys, "argv", ["pretraining.py", *arguments])
    assert pretraining.main() == 2
    error = capsys.readouterr().err.strip()
    assert error == "python -m demo.pretraining: steps must be at least 1, got 0"
    assert not any(tmp_path.iterdir())
