"""Small datasets in COCO's format, written by tests, and detections that are exactly right."""

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances

SIDE = 64  # of the images, in pixels


def coco(images=2, objects=2, classes=("cat", "dog"), keypoints=(), **annotation):
    """The content of a file: boxes of 8 x 8 pixels in rows, with triangles as masks.

    Args:
        keypoints: their names; none: the file has no keypoints.
        annotation: values of keys of all annotations; None: they do not have the key.
    """
    content = {
        "images": [
            {"id": i + 1, "file_name": f"{i + 1}.png", "height": SIDE, "width": SIDE}
            for i in range(images)
        ],
        "categories": [
            {"id": i + 1, "name": name, **({"keypoints": list(keypoints)} if keypoints else {})}
            for i, name in enumerate(classes)
        ],
        "annotations": [],
    }
    for i in range(images):
        for k in range(objects):
            x, y = 9 * (k % 7), 9 * (k // 7)
            entry = {
                "id": len(content["annotations"]) + 1,
                "image_id": i + 1,
                "category_id": k % len(classes) + 1,
                "bbox": [x, y, 8, 8],
                "area": 32,
                "iscrowd": 0,
                "segmentation": [[x, y, x + 8, y, x + 8, y + 8]],
                **annotation,
            }
            if keypoints:
                entry["keypoints"] = [v for n in range(len(keypoints)) for v in (x + n, y + n, 2)]
                entry["num_keypoints"] = len(keypoints)
            content["annotations"].append({k: v for k, v in entry.items() if v is not None})
    return content


def detections(content, masks=False):
    """Exactly the objects of a file, in COCO's result format."""
    found = []
    for number, annotation in enumerate(content["annotations"]):
        entry = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
        if masks:
            polygons = mask_util.frPyObjects(annotation["segmentation"], SIDE, SIDE)
            rle = mask_util.merge(polygons)
            entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        found.append({**entry, "score": 1 - number / 10000})
    return found


def outputs(content, masks=False):
    """The same as a model gives it: for each image, what goes in and what comes out."""
    contiguous = {c["id"]: i for i, c in enumerate(sorted(content["categories"], key=_id))}
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        found = Instances((SIDE, SIDE))
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        found.scores = 1 - torch.arange(len(own)) / 10000
        found.pred_classes = torch.tensor([contiguous[a["category_id"]] for a in own])
        if masks:
            polygons = [mask_util.frPyObjects(a["segmentation"], SIDE, SIDE) for a in own]
            decoded = [mask_util.decode(mask_util.merge(p)) for p in polygons]
            found.pred_masks = torch.tensor(np.stack(decoded)).bool()
        if any("keypoints" in a for a in own):
            points = torch.tensor([a["keypoints"] for a in own], dtype=torch.float32)
            # Detectron2 takes pixels for areas
            found.pred_keypoints = points.reshape(len(own), -1, 3) + torch.tensor([0.5, 0.5, 0])
        yield [{"image_id": image["id"]}], [{"instances": found}]


def _id(entry):
    return entry["id"]
