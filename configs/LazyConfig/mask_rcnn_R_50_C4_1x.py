from .common import normalized

dataloader, lr_multiplier, model, optimizer, train = normalized(
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py"
)
