"""Random datasets and detections with everything that makes COCO's evaluation difficult."""

import copy

import numpy as np
import pycocotools.mask as mask_util

SIDE = 160  # of the images, in pixels


def rectangle_mask(box):
    x, y, w, h = box
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y : y + h, x : x + w] = 1
    mask[y : y + h // 3, x : x + w // 3] = 0  # not the box, so that box and mask AP differ
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_coco(num_images=12, seed=0):
    """Objects of three sizes, crowds, a class without objects, images without any."""
    rng = np.random.default_rng(seed)
    images, annotations, predictions = [], [], []
    for i in range(num_images):
        image_id = 10 * (i + 1)
        images.append({"id": image_id, "height": SIDE, "width": SIDE, "file_name": f"{i}.png"})
        for _ in range(rng.integers(0, 5)):
            side = int(rng.choice([20, 60, 110]))
            x, y = (int(v) for v in rng.integers(0, SIDE - side, 2))
            box, category = [x, y, side, side], int(rng.choice([1, 5]))
            segmentation = rectangle_mask(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": float(mask_util.area(segmentation)),
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": segmentation,
                }
            )
            for _ in range(rng.integers(0, 4)):
                shift = rng.integers(0, side // 4, 2)
                moved = [min(x + int(shift[0]), SIDE - side), min(y + int(shift[1]), SIDE - side)]
                predictions.append(prediction(rng, image_id, category, [*moved, side, side]))
        for _ in range(rng.integers(0, 4)):  # where nothing is, or of another class
            predictions.append(
                prediction(rng, image_id, int(rng.choice([1, 5, 9])), [5, 5, 30, 40])
            )
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in ((1, "one"), (5, "five"), (9, "nine"))],
    }
    return content, predictions


def prediction(rng, image_id, category, box):
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": [float(v) for v in box],
        # few different scores: equal ones are common, within an image and between images
        "score": float(rng.integers(1, 6)) / 5,
        "segmentation": rectangle_mask(box),
    }


def duplicated(content, predictions, times):
    """The dataset in which image i occurs times[i] times, its copies following one another."""
    new = {**content, "images": [], "annotations": []}
    new_predictions = []
    for image, count in zip(content["images"], times):
        for number in range(count):
            new_id = image["id"] * 1000 + number
            new["images"].append({**image, "id": new_id})
            for source, target in (
                (content["annotations"], new["annotations"]),
                (predictions, new_predictions),
            ):
                for item in source:
                    if item["image_id"] == image["id"]:
                        target.append({**copy.deepcopy(item), "image_id": new_id})
    for number, annotation in enumerate(new["annotations"]):
        annotation["id"] = number + 1
    return new, new_predictions
