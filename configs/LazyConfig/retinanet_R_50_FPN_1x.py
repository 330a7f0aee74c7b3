from .common import normalized

dataloader, lr_multiplier, model, optimizer, train = normalized(
    "COCO-Detection/retinanet_R_50_FPN_1x.py"
)
