"""Intervals, differences and groups against their definitions, and the page made of them."""

import json
import math
import re

import numpy as np
import pytest
import yaml
from analysis.random_coco import random_coco
from data.small_coco import coco, detections
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from wsbcn_d2.analysis import CocoEvaluation, compare_runs
from wsbcn_d2.analysis import comparison as comparison_module
from wsbcn_d2.analysis import read_run, resample_images
from wsbcn_d2.analysis.comparison import (
    difference,
    load_results,
    merge_results,
    verdict,
    write_results,
)
from wsbcn_d2.analysis.comparison_page import comparison_page

DRAWS = 40


@pytest.fixture
def runs(tmp_path):
    """Three runs with predictions, the first two of one setting, and one without."""
    content, predictions = random_coco()
    (tmp_path / "truth.json").write_text(json.dumps(content))
    rng = np.random.default_rng(5)
    folders = []
    for name, keep in (("a_s1", 1.0), ("a_s2", 0.9), ("b", 0.6), ("c", None)):
        folder = tmp_path / name
        (folder / "inference").mkdir(parents=True)
        line = {"iteration": 9, "total_loss": 2.0, "time": 0.25}
        (folder / "metrics.json").write_text(json.dumps(line) + "\n")
        if keep is not None:
            own = [p for p in predictions if rng.random() < keep]
            (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(own))
        folders.append(folder)
    runs = [read_run(str(folder)) for folder in folders]
    runs[1].parameters, runs[1].peak_memory = 2_500_000, 1234.0
    return runs


@pytest.fixture
def results(runs, tmp_path):
    labels = ["A", "A", "B", "C"]
    annotations = str(tmp_path / "truth.json")
    return compare_runs(runs, labels, annotations=annotations, num_draws=DRAWS, seed=2)


def draws_of(run, tmp_path, metric="AP", kind="bbox", seed=2):
    evaluation = CocoEvaluation(COCO(str(tmp_path / "truth.json")), run.load_predictions(), kind)
    value = evaluation.evaluate()[metric][0]
    return value, evaluation.evaluate(resample_images(12, DRAWS, seed=seed))[metric]


def assert_interval(entry, value, draws):
    low, high = np.percentile(draws - draws.mean(), [2.5, 97.5]) + value
    found = [entry["value"], entry["low"], entry["high"]]
    np.testing.assert_allclose(found, [value, low, high], atol=1e-4)


def test_intervals_of_runs_groups_and_differences(runs, results, tmp_path):
    first, second, other = (draws_of(run, tmp_path) for run in runs[:3])
    assert_interval(results["runs"][1]["ap"]["bbox"]["AP"], *second)
    mean = ((first[0] + second[0]) / 2, (first[1] + second[1]) / 2)
    group = results["groups"][0]
    assert (group["label"], group["runs"]) == ("A", 2)
    assert_interval(group["ap"]["bbox"]["AP"], *mean)
    assert group["ap"]["bbox"]["AP"]["sd"] == pytest.approx(
        abs(first[0] - second[0]) / math.sqrt(2), abs=1e-4
    )
    # paired: the draws of one are subtracted from the same draws of the other
    entry = difference(results, "A", "B")["bbox"]["AP"]
    assert_interval(entry, mean[0] - other[0], mean[1] - other[1])
    turned = difference(results, "B", "A")["bbox"]["AP"]
    assert [turned["value"], turned["low"], turned["high"]] == [
        -entry["value"],
        -entry["high"],
        -entry["low"],
    ]


def test_interval_of_an_ap_has_no_negative_end(tmp_path):
    """A run that finds one object of all; beside it one that finds all."""
    content, _ = random_coco()
    (tmp_path / "truth.json").write_text(json.dumps(content))
    keys = ("image_id", "category_id", "bbox", "segmentation")
    found = [{k: a[k] for k in keys} for a in content["annotations"] if not a["iscrowd"]]
    for name, part in (("one", found[8:9]), ("all", found)):
        (tmp_path / name / "inference").mkdir(parents=True)
        path = tmp_path / name / "inference" / "coco_instances_results.json"
        path.write_text(json.dumps([{**f, "score": 0.9} for f in part]))
    runs = [read_run(str(tmp_path / name)) for name in ("one", "all")]
    results = compare_runs(
        runs, ["one", "all"], annotations=str(tmp_path / "truth.json"), num_draws=DRAWS
    )
    value, draws = draws_of(runs[0], tmp_path, seed=0)
    entry = results["groups"][0]["ap"]["bbox"]["AP"]
    assert np.percentile(draws, 2.5) - draws.mean() < -value < 0 == entry["low"]
    entry = difference(results, "one", "all")["bbox"]["AP"]
    assert entry["low"] < entry["value"] < entry["high"] < 0


def perfect_run(folder, content, masks=False, **settings):
    """The folder of a run that has found exactly the objects of a file, and that file."""
    (folder / "run" / "inference").mkdir(parents=True)
    path = folder / "run" / "inference" / "coco_instances_results.json"
    path.write_text(json.dumps(detections(content, masks)))
    cfg = {"MODEL": {"MASK_ON": masks}, "TEST": settings}
    (folder / "run" / "config.yaml").write_text(yaml.dump(cfg))
    (folder / "truth.json").write_text(json.dumps(content))
    return read_run(str(folder / "run")), str(folder / "truth.json")


def test_detections_beyond_cocos_100_count_where_the_config_allows_them(tmp_path):
    content = coco(images=1, objects=150, classes=("cat",))
    for limit, standard in ((150, 150), (-1, 150), (100, 100)):
        run, truth = perfect_run(tmp_path / str(limit), content, DETECTIONS_PER_IMAGE=limit)
        line = {"iteration": 1, "bbox/AP": _cocos_ap(truth, run)}  # as Detectron2's trainer logs it
        (run.folder / "metrics.json").write_text(json.dumps(line))
        run = read_run(str(run.folder))
        results = compare_runs([run], ["A"], annotations=truth, num_draws=3)
        (described,) = results["runs"]
        ap = described["ap"]["bbox"]
        if standard == 100:
            assert ap["AP"]["value"] == pytest.approx(_cocos_ap(truth, run), abs=1e-4)
            assert "AP@100" not in ap and not any("COCO" in n for n in described["notes"])
            continue
        assert ap["AP"]["value"] == 100
        assert ap["AP@100"]["value"] == pytest.approx(_cocos_ap(truth, run), abs=1e-4)
        assert ap["AP@100"]["value"] < 70
        (note,) = [n for n in described["notes"] if "COCO" in n]
        assert f"DETECTIONS_PER_IMAGE ({limit})" in note
        assert f"box AP {_cocos_ap(truth, run):.2f} instead of 100.00" in note
        assert not any("another evaluation" in n for n in described["notes"])


def _cocos_ap(truth, run):
    truth = COCO(truth)
    judge = COCOeval(truth, truth.loadRes(run.load_predictions()), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats[0] * 100


def test_annotations_as_people_have_them(tmp_path):
    """Ids from 0, and without the keys that COCO always has."""
    content = coco(objects=3, area=None, iscrowd=None)
    for entry in content["annotations"]:
        entry["id"] -= 1
    run, truth = perfect_run(tmp_path, content, masks=True)
    results = compare_runs([run], ["A"], annotations=truth, num_draws=3)
    ap = results["runs"][0]["ap"]
    assert ap["bbox"]["AP"]["value"] == ap["segm"]["AP"]["value"] == 100
    assert results["dataset"]["instances"] == 6


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("annotations"), "truth.json' has no annotations, so there is no AP"),
        (lambda c: c.pop("categories"), "'categories' is missing"),
        (lambda c: c["categories"][1].update(id=3), "category_id is 2; it must be one of"),
        (lambda c: c["annotations"].pop(1) and c["categories"].pop(), "predictions of category_id"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, change, message):
    content = coco(images=1)
    run, truth = perfect_run(tmp_path, content)
    change(content)
    with open(truth, "w") as file:
        json.dump(content, file)
    with pytest.raises(ValueError, match=message):
        compare_runs([run], ["A"], annotations=truth, num_draws=3)


def test_a_run_against_itself_does_not_differ(runs, tmp_path):
    results = compare_runs(
        [runs[0], runs[0]], ["x", "y"], annotations=str(tmp_path / "truth.json"), num_draws=20
    )
    for metrics in difference(results, "x", "y").values():
        for name, entry in metrics.items():
            assert (entry["value"], entry["low"], entry["high"]) == (0, 0, 0), name


def test_seed_noise_is_welchs_interval():
    """Variances 1 and 4 of 3 runs each: 2.94 degrees of freedom, which are rounded down."""
    a, b = [10.0, 11.0, 12.0], [20.0, 22.0, 24.0]
    freedom = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    assert 2 < freedom < 3
    noise = comparison_module.seed_noise(a, b)
    assert noise == pytest.approx(4.303 * math.sqrt(5 / 3))  # t for 2 degrees of freedom
    assert math.isnan(comparison_module.seed_noise([1.0], b))


def test_student_t():
    stats = pytest.importorskip("scipy.stats", reason="another source of the quantiles")
    for freedom in range(1, 21):
        expected = stats.t.ppf(0.975, freedom)
        assert comparison_module._student_t(freedom + 0.5) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    "value, low, high, seeds, expected",
    [
        (3.0, 1.0, 5.0, 2.0, "better"),
        (-3.0, -5.0, -1.0, 2.0, "worse"),
        (3.0, -1.0, 5.0, 2.0, "within the noise of images"),
        (3.0, 1.0, 5.0, 4.0, "within the noise of seeds"),
        (3.0, 1.0, 5.0, None, "better on these images; seeds unknown"),
        (3.0, None, None, None, "no intervals"),
        (3.0, None, None, 4.0, "within the noise of seeds"),
        (-3.0, None, None, 2.0, "worse over seeds; images unknown"),
        (None, None, None, None, ""),
    ],
)
def test_verdict(value, low, high, seeds, expected):
    assert verdict({"value": value, "low": low, "high": high, "seeds": seeds}) == expected


def test_page_says_all_and_needs_nothing_else(results, tmp_path):
    paths = comparison_page(results, baseline="B").write(str(tmp_path / "out"), "page")
    markdown = (tmp_path / "out" / "page.md").read_text()
    html = (tmp_path / "out" / "page.html").read_text()
    pictures = [path for path in paths if path.endswith(".png")]
    assert len(pictures) == 3
    for path in pictures:
        assert path.rsplit("/", 1)[1] in markdown
    # nothing outside is referred to, neither a file nor an address
    assert html.count('src="data:image/png;base64,') == len(pictures) == html.count("<img")
    assert not re.search(r"https?://|<link|<script|@import|url\(", html)
    entry = results["groups"][0]["ap"]["bbox"]["AP"]
    cell = f"{entry['value']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"
    for text in (markdown, html):
        assert cell in text and "Differences from B" in text
        assert "no inference/coco_instances_results.json" in text
    assert "| C | 1, 0 evaluated | – |" in markdown
    assert "| A | – | 10 | 250 | 1234 | 2.50 |" in markdown


def test_page_is_rebuilt_from_the_file(results, tmp_path):
    write_results(results, str(tmp_path / "results.json"))
    loaded = load_results(str(tmp_path / "results.json"))
    assert loaded == json.loads(json.dumps(results))
    assert comparison_page(loaded).markdown("p") == comparison_page(results).markdown("p")
    first, second = (
        comparison_page(r).write(str(tmp_path / n), "p") for r, n in ((loaded, "x"), (results, "y"))
    )
    for a, b in zip(first, second):
        assert open(a, "rb").read() == open(b, "rb").read(), a


def test_merged_is_as_if_compared_at_once(runs, results, tmp_path):
    """Runs of one setting in different files; the interval of AP is known to two digits."""
    options = {"annotations": str(tmp_path / "truth.json"), "num_draws": DRAWS, "seed": 2}
    parts = {}
    for name, i, labels in (("x", (0, 2), "AB"), ("y", (1, 3), "AC")):
        path = str(tmp_path / f"{name}.json")
        write_results(compare_runs([runs[j] for j in i], list(labels), **options), path)
        parts[path] = load_results(path)
    merged = merge_results(parts)
    assert [(g["label"], g["runs"]) for g in merged["groups"]] == [("A", 2), ("B", 1), ("C", 1)]
    of_a, of_b = (group["ap"]["bbox"] for group in merged["groups"][:2])
    at_once = results["groups"][0]["ap"]["bbox"]
    assert of_b == results["groups"][1]["ap"]["bbox"]  # every metric of a whole group
    for key, tolerance in (("value", 1e-3), ("sd", 1e-3), ("low", 0.02), ("high", 0.02)):
        assert of_a["AP"][key] == pytest.approx(at_once["AP"][key], abs=tolerance), key
    assert of_a["AP50"]["value"] == pytest.approx(at_once["AP50"]["value"], abs=1e-3)
    assert of_a["AP50"]["low"] is None
    assert difference(merged, "B", "C") == difference(results, "B", "C")
    found, expected = (difference(r, "A", "B")["segm"]["AP"] for r in (merged, results))
    for key in ("value", "low", "high"):
        assert found[key] == pytest.approx(expected[key], abs=0.02), key
    assert "| A | 2 |" in comparison_page(merged, "B").markdown("p")


def test_comparisons_that_cannot_be_merged(runs, tmp_path):
    options = {"annotations": str(tmp_path / "truth.json"), "num_draws": DRAWS}
    one = compare_runs(runs[:1], ["A"], **options)
    runs[0].predictions_file, runs[0].notes = None, ["gone in the meantime"]
    for again in (json.loads(json.dumps(one)), compare_runs(runs[:1], ["B"], **options)):
        with pytest.raises(ValueError, match="'a_s1' is both in x and in y"):
            merge_results({"x": one, "y": again})
    with pytest.raises(ValueError, match=r"x and y differ in the bootstrap: .*'seed': 3"):
        merge_results({"x": one, "y": compare_runs(runs[1:2], ["A"], seed=3, **options)})
    for key, value in (("images", 5), ("classes", ["0"]), ("name", "other")):
        other = {**one, "dataset": {**one["dataset"], key: value}}
        with pytest.raises(ValueError, match=r"x and y are of different datasets: 'truth' of 12 "):
            merge_results({"x": one, "y": other})


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.json"
    kind = '{"kind": "comparison", "runs": [3]}'
    for text, message in (
        ("{", "is not a JSON file"),
        ("[]", '"kind" is not'),
        ("{}", "kind"),
        (kind, 'x.json is not complete: it has no list "groups"'),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_results(str(path))


def test_unknown_baseline(results):
    with pytest.raises(ValueError, match="no baseline 'Z'; the groups are A, B, C"):
        comparison_page(results, "Z")


def test_metrics_alone_have_no_intervals(runs, tmp_path):
    run = runs[3]
    run.metrics.append({"iteration": 9, "bbox/AP": 12.5, "bbox/AP50": 30.0, "segm/AP": 11.0})
    results = compare_runs([run], ["C"])
    entry = results["groups"][0]["ap"]["bbox"]["AP"]
    assert (entry["value"], entry["low"]) == (12.5, None)
    assert "| C | 1 | 12.5 | 30.0 |" in comparison_page(results).markdown("p")


def test_predictions_of_another_evaluation_are_noticed(runs, tmp_path):
    runs[0].metrics.append({"iteration": 9, "bbox/AP": 1.25})
    results = compare_runs(runs[:1], ["A"], annotations=str(tmp_path / "truth.json"), num_draws=0)
    [note] = [n for n in results["runs"][0]["notes"] if "metrics.json is" in n]
    assert "the last box AP in metrics.json is 1.25, but the predictions have" in note
    assert results["runs"][0]["ap"]["bbox"]["AP"]["low"] is None


PREDICTION = '{"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [1, 2, 3, 4]}'


def test_runs_that_cannot_be_compared(runs, tmp_path):
    with pytest.raises(ValueError, match="no config.yaml says which dataset"):
        compare_runs(runs, ["A"] * 4)
    runs[0].test_datasets, runs[1].test_datasets = ("digits_val",), ("coco_2017_val",)
    with pytest.raises(ValueError, match=r"'digits_val' \(a_s1\), 'coco_2017_val' \(a_s2\)"):
        compare_runs(runs, ["A"] * 4)
    with pytest.raises(FileNotFoundError, match="no annotation file 'nowhere.json'"):
        compare_runs(runs, ["A"] * 4, annotations="nowhere.json")
    for prediction, message in (
        (PREDICTION.replace('"image_id": 1', '"image_id": 77'), "image_id 77"),
        (PREDICTION.replace("0.5", "NaN"), "prediction 0 is not in COCO's result format"),
        (PREDICTION.replace("[1,", "[NaN,"), "prediction 0 is not in COCO's result format"),
        (PREDICTION.replace("4]", "-4]"), "prediction 0 is not in COCO's result format"),
        (PREDICTION.replace(", 4]", "]"), "prediction 0 is not in COCO's result format"),
        ("3", "prediction 0 is not in COCO's result format"),
    ):
        runs[0].predictions_file.write_text(f"[{prediction}]")
        with pytest.raises(ValueError, match=f"coco_instances_results.json: .*{message}"):
            compare_runs(runs, ["A"] * 4, annotations=str(tmp_path / "truth.json"))


def test_a_prediction_without_a_mask_is_not_overlooked(runs, tmp_path):
    predictions = runs[0].load_predictions()
    del predictions[-1]["segmentation"]
    runs[0].predictions_file.write_text(json.dumps(predictions))
    with pytest.raises(ValueError, match=f"prediction {len(predictions) - 1}: the mask must be"):
        compare_runs(runs, ["A"] * 4, annotations=str(tmp_path / "truth.json"))


def test_ap_that_a_run_logged_for_another_dataset(runs):
    for run, name in zip(runs, ("digits_val", "other_val")):
        run.predictions_file, run.test_datasets = None, (name,)
        run.metrics.append({"iteration": 9, "bbox/AP": 12.0})
    results = compare_runs(runs[:2], ["A", "B"], dataset="other_val", num_draws=0)
    assert [bool(run["ap"]) for run in results["runs"]] == [False, True]


def test_dollars_in_labels(runs, tmp_path):
    """They begin a formula in matplotlib, here one that it cannot read."""
    labels = [r"$\frac{$", "US$ or CA$", "b$", "c"]
    results = compare_runs(
        runs, labels, annotations=str(tmp_path / "truth.json"), num_draws=DRAWS, seed=2
    )
    page = comparison_page(results)
    page.write(str(tmp_path / "page"), "p")
    assert labels[0] in (tmp_path / "page" / "p.md").read_text()
