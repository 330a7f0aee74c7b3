from .common import normalized

dataloader, lr_multiplier, model, optimizer, train = normalized(
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py"
)
