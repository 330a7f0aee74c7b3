import json

import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage

from benchmarks.measure import saved_bytes
from benchmarks.train import (
    Trainee,
    benchmark_train,
    config,
    fixed_heads,
    make_batch,
    make_proposals,
    parse_size,
)
from wsbcn_d2 import checkpoint_activations_

CPU = torch.device("cpu")
SMALL = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30"]


def trainee(norm):
    return Trainee(config("R-18-FPN", norm, CPU, SMALL))


def batch_of(images=1, size=(64, 64)):
    return make_batch(images, size, CPU)


@pytest.mark.parametrize("bitmasks", [False, True])
def test_images_and_objects(bitmasks):
    batch = make_batch(2, (60, 90), CPU, bitmasks)
    again = make_batch(2, (60, 90), CPU)
    for inputs, other in zip(batch, again):
        assert inputs["image"].shape == (3, 60, 90) and inputs["image"].dtype == torch.uint8
        instances = inputs["instances"]
        torch.testing.assert_close(inputs["image"], other["image"])
        torch.testing.assert_close(instances.gt_boxes.tensor, other["instances"].gt_boxes.tensor)
        assert instances.gt_boxes.nonempty().all() and len(instances) == 8
        assert instances.gt_classes.max() < 10
        # an ellipse fills pi/4 of its box, and pixels its boundary
        masks = instances.gt_masks
        assert isinstance(masks, BitMasks if bitmasks else PolygonMasks)
        area = masks.tensor.sum((1, 2)) if bitmasks else torch.as_tensor(masks.area())
        assert (area / instances.gt_boxes.area() - torch.pi / 4).abs().max() < 0.1
        boxes = masks.get_bounding_boxes().tensor
        assert (boxes - instances.gt_boxes.tensor).abs().max() < 3
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


def test_the_proposals_fill_the_heads_of_the_full_size():
    size = (800, 1333)
    boxes = make_batch(1, size, CPU)[0]["instances"].gt_boxes
    proposals = make_proposals(boxes.tensor, size, 1000).proposal_boxes
    assert len(proposals) == 1000 and proposals.nonempty().all()
    assert proposals.tensor.min() >= 0 and (proposals.tensor <= torch.tensor([1333, 800] * 2)).all()
    overlap = pairwise_iou(proposals, boxes).max(dim=1).values
    assert overlap[:333].min() > 0.8
    # of 512 samples a quarter are foreground
    assert (overlap >= 0.5).sum() >= 128 and (overlap < 0.5).sum() >= 384


def test_heads_have_as_much_to_do_whatever_the_norm():
    batches = [batch_of(2, (64, 96)), batch_of(2, (96, 64))]
    seen, sizes = {}, []
    for norm in ("GN", "BCN+WS"):
        model = trainee(norm).model
        model.roi_heads.register_forward_pre_hook(
            lambda module, inputs: sizes.append(inputs[2][0].image_size)
        )
        shapes = seen[norm] = []
        for head in (model.roi_heads.box_head, model.roi_heads.mask_head):
            head.register_forward_pre_hook(lambda m, inputs: shapes.append(inputs[0].shape))
        with fixed_heads(model, batches), torch.no_grad(), EventStorage():
            for batch in batches:
                model(batch)
    assert seen["GN"] == seen["BCN+WS"]
    assert [shape[0] for shape in seen["GN"]] == [2 * 8, 2 * 2] * 2
    assert sizes == [(64, 96), (96, 64)] * 2


def test_the_heads_are_free_again():
    model = trainee("GN").model.eval()
    batch = batch_of()
    with fixed_heads(model, [batch]):
        pass
    images = model.preprocess_image(batch)
    proposals, _ = model.proposal_generator(images, model.backbone(images.tensor), None)
    assert proposals[0].objectness_logits.unique().numel() > 1


def test_a_step_changes_no_parameter():
    batch = batch_of()
    it = trainee("GN+WS")
    with fixed_heads(it.model, [batch]):
        before = {k: v.clone() for k, v in it.model.named_parameters()}
        for _ in range(2):
            it.step(batch)
    torch.testing.assert_close(dict(it.model.named_parameters()), before, rtol=0, atol=0)
    momenta = [state["momentum_buffer"] for state in it.optimizer.state.values()]
    assert len(momenta) == len(before) and any(m.abs().max() > 0 for m in momenta)
    state = sum(p.numel() * 4 for p in before.values()) * 2
    buffers = sum(b.numel() * b.element_size() for b in it.model.buffers())
    assert it.state_bytes() == state + buffers


def test_memory_of_a_step():
    batch = batch_of()
    measured = {}
    for norm in ("GN", "BCN+WS"):
        it = trainee(norm)
        gradients = sum(4 * p.numel() for p in it.model.parameters())
        for checkpointed in ("", "all"):
            checkpoint_activations_(it.model, checkpointed)
            with fixed_heads(it.model, [batch]):
                measured[norm, checkpointed] = memory = it.memory(batch)
                if (norm, checkpointed) == ("GN", ""):
                    parameters = [*it.model.parameters(), *it.model.buffers(), batch[0]["image"]]
                    by_autograd = saved_bytes(lambda: it.loss(batch), parameters)
            assert memory["peak_bytes"] >= it.state_bytes() + 0.99 * gradients
            named = sum(memory["at_peak"].values())
            assert 0.8 * memory["peak_bytes"] < named <= memory["peak_bytes"]
    saved = {case: memory["saved_bytes"] for case, memory in measured.items()}
    # Some small results are alive, and some of what autograd saves was there before.
    assert 0.99 * by_autograd <= saved["GN", ""] <= 1.1 * by_autograd
    assert saved["BCN+WS", "all"] < saved["BCN+WS", ""] < saved["GN", ""]


def test_results_with_images_of_several_sizes():
    one, both = (
        benchmark_train(
            "R-18-FPN",
            ["GN", "BCN+WS"],
            device=CPU,
            sizes=sizes,
            opts=SMALL,
            repetitions=2,
            warmup=1,
            progress=False,
        )
        for sizes in ([(64, 64)], [(64, 64), (96, 128)])
    )
    assert json.loads(json.dumps(both)) == both
    assert [row["contender"] for row in both["rows"]] == ["GN", "BCN+WS"]
    for small, large in zip(one["rows"], both["rows"]):
        assert 0 < large["step"]["q1"] <= large["step"]["median"] <= large["step"]["q3"]
        assert large["saved_bytes"] > 1.5 * small["saved_bytes"]  # that of the larger image
    assert both["settings"]["sizes"] == [[64, 64], [96, 128]]


@pytest.mark.parametrize("norm", ["GN", "GN+WS", "BCN", "BCN+WS"])
def test_configs(norm):
    for model, depth in (("R-18-FPN", 18), ("R-50-FPN", 50), ("RetinaNet-R-50-FPN", 50)):
        cfg = config(model, norm, CPU)
        assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.BACKBONE.FREEZE_AT) == (depth, 0)
        assert cfg.MODEL.RESNETS.NORM == cfg.MODEL.FPN.NORM == norm
        assert cfg.MODEL.ROI_BOX_HEAD.NORM == cfg.MODEL.ROI_MASK_HEAD.NORM == norm
        assert cfg.MODEL.RETINANET.NORM == norm
        assert ("RetinaNet" in model) == (cfg.MODEL.META_ARCHITECTURE == "RetinaNet")


def test_sizes():
    assert parse_size("256") == (256, 256) and parse_size("800x1333") == (800, 1333)
    for text in ("", "20", "800x", "1x2x3", "800 x 1333"):
        with pytest.raises(ValueError, match="--size: must be like 256 or 800x1333"):
            parse_size(text)
