"""What other projects compute, from state dicts with their names: written from their code, and
independent of the conversion."""

import torch
import torch.nn.functional as F


def gn_ws_filters(w):
    """github.com/joe-siyuan-qiao/WeightStandardization; mmcv's ConvWS2d."""
    mean = w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    w = w - mean
    std = w.view(w.size(0), -1).std(1).view(-1, 1, 1, 1) + 1e-5
    return w / std


def bcn_ws_filters(w):
    """github.com/joe-siyuan-qiao/Batch-Channel-Normalization, imagenet/models/layers.py."""
    mean = w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    w = w - mean
    std = torch.pow(w.view(w.size(0), -1).var(1) + 1e-5, 0.5).view(-1, 1, 1, 1)
    return w / std


def group_norm(x, sd, name):
    return F.group_norm(x, 32, sd[name + ".weight"], sd[name + ".bias"], 1e-5)


def batch_norm(x, sd, name):
    mean, var = sd[name + ".running_mean"], sd[name + ".running_var"]
    return F.batch_norm(x, mean, var, sd[name + ".weight"], sd[name + ".bias"], False, 0, 1e-5)


def authors_bcn(x, sd, name):
    """The class GN of the file above, in evaluation."""
    out = batch_norm(x, sd, name + ".pbn").reshape(1, x.size(0) * 32, -1)
    out = torch.batch_norm(out, None, None, None, None, True, 0, 1e-5, True)
    out = out.view(x.size(0), 32, -1)
    return (sd[name + ".weight"] * out + sd[name + ".bias"]).view_as(x)


class Random:
    """State dict entries with values that make errors visible."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.sd = {}

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).float()

    def conv(self, name, out, into, k, groups=1, bias=False):
        scale = torch.rand(out, 1, 1, 1, generator=self.generator) * 0.05 + 0.005
        self.sd[name + ".weight"] = self.randn(out, into // groups, k, k) * scale + 0.01
        if bias:
            self.sd[name + ".bias"] = self.randn(out)

    def linear(self, name, out, into):
        self.sd[name + ".weight"] = self.randn(out, into) * 0.1
        self.sd[name + ".bias"] = self.randn(out)

    def affine(self, name, *shape):
        self.sd[name + ".weight"] = self.randn(*shape) * 0.3 + 1
        self.sd[name + ".bias"] = self.randn(*shape) * 0.3

    def statistics(self, name, channels):
        self.affine(name, channels)
        self.sd[name + ".running_mean"] = self.randn(channels) * 0.3
        self.sd[name + ".running_var"] = self.randn(channels).square() + 0.5
        self.sd[name + ".num_batches_tracked"] = torch.tensor(7)


def bcn_entries(random, name, channels):
    random.affine(name, 1, 32, 1)
    random.statistics(name + ".pbn", channels)


def gn_entries(random, name, channels):
    random.affine(name, channels)


BLOCKS = (3, 4, 6, 3)


def make_resnet50(random, norm_entries, prefix="", norm="bn", stem="", groups=1, width=32, out=64):
    """A ResNet-50 with torchvision's names; ``width`` and ``out`` are those of the first stage."""
    random.conv(f"{prefix}{stem}conv1", 32, 3, 7)
    norm_entries(random, f"{prefix}{stem}{norm}1", 32)
    into = 32
    for s, blocks in enumerate(BLOCKS):
        w, o = width * 2**s, out * 2**s
        for b in range(blocks):
            name = f"{prefix}layer{s + 1}.{b}."
            for i, shape in enumerate([(w, into, 1), (w, w, 3), (o, w, 1)], 1):
                random.conv(name + f"conv{i}", *shape, groups=groups if i == 2 else 1)
                norm_entries(random, name + f"{norm}{i}", shape[0])
            if b == 0:
                random.conv(name + "downsample.0", o, into, 1)
                norm_entries(random, name + "downsample.1", o)
            into = o


def resnet50(
    x,
    sd,
    filters,
    normalize,
    prefix="",
    norm="bn",
    stem="",
    groups=1,
    dilated=False,
    stride_in_1x1=False,
):
    """The outputs of its stages; the last stage has no stride if it is dilated."""

    def conv(x, name, stride=1, padding=0, groups=1, dilation=1):
        return F.conv2d(x, filters(sd[name + ".weight"]), None, stride, padding, dilation, groups)

    x = F.relu(normalize(conv(x, f"{prefix}{stem}conv1", 2, 3), sd, f"{prefix}{stem}{norm}1"))
    x = F.max_pool2d(x, 3, 2, 1)
    stages = []
    for s, blocks in enumerate(BLOCKS):
        for b in range(blocks):
            name = f"{prefix}layer{s + 1}.{b}."
            dilation = 2 if dilated and s == 3 else 1
            stride = 2 if s > 0 and b == 0 and dilation == 1 else 1
            strides = (stride, 1) if stride_in_1x1 else (1, stride)
            y = F.relu(normalize(conv(x, name + "conv1", strides[0]), sd, name + f"{norm}1"))
            y = conv(y, name + "conv2", strides[1], dilation, groups, dilation)
            y = F.relu(normalize(y, sd, name + f"{norm}2"))
            y = normalize(conv(y, name + "conv3"), sd, name + f"{norm}3")
            if b == 0:
                x = normalize(conv(x, name + "downsample.0", stride), sd, name + "downsample.1")
            x = F.relu(x + y)
        stages.append(x)
    return stages


class Detector:
    """A Mask R-CNN with GN+WS under the names of a project: what its parts compute."""

    def __init__(self, names, classes=3, background_first=False, dim=32, fc=16):
        self.names = names
        self.random = Random()
        self.sd = self.random.sd
        self.background_first = background_first
        make_resnet50(self.random, gn_entries, **names["resnet"])
        for i in range(4):
            self._layer(names["lateral"](i), dim, 64 * 2**i, 1)
            self._layer(names["output"](i), dim, dim, 3)
        self.random.conv(names["rpn"], dim, dim, 3, bias=True)
        self.random.conv(names["objectness"], 3, dim, 1, bias=True)
        self.random.conv(names["deltas"], 12, dim, 1, bias=True)
        for i in range(4):
            self._layer(names["box_conv"](i), dim, dim, 3)
            self._layer(names["mask_conv"](i), dim, dim, 3)
        self.random.linear(names["fc"], fc, dim * 49)
        self.random.linear(names["cls"], classes + 1, fc)
        self.random.linear(names["reg"], 4 * (classes + background_first), fc)
        self.random.conv(names["deconv"], dim, dim, 2)
        self.sd[names["deconv"] + ".bias"] = self.random.randn(dim)
        self.random.conv(names["mask"], classes + background_first, dim, 1, bias=True)

    def _layer(self, names, out, into, k):
        self.random.conv(names[0], out, into, k)
        gn_entries(self.random, names[1], out)

    def _normalized(self, x, names, k):
        y = F.conv2d(x, gn_ws_filters(self.sd[names[0] + ".weight"]), padding=k // 2)
        return group_norm(y, self.sd, names[1])

    def _plain(self, function, x, name, **options):
        return function(x, self.sd[name + ".weight"], self.sd.get(name + ".bias"), **options)

    def backbone(self, x):
        return resnet50(x, self.sd, gn_ws_filters, group_norm, **self.names["resnet"])

    def fpn(self, stages):
        merged = None
        outputs = []
        for i in reversed(range(4)):
            lateral = self._normalized(stages[i], self.names["lateral"](i), 1)
            if merged is not None:
                lateral = lateral + F.interpolate(merged, scale_factor=2, mode="nearest")
            merged = lateral
            outputs.insert(0, self._normalized(merged, self.names["output"](i), 3))
        return outputs

    def rpn(self, x):
        x = F.relu(self._plain(F.conv2d, x, self.names["rpn"], padding=1))
        parts = (self.names["objectness"], self.names["deltas"])
        return [self._plain(F.conv2d, x, name) for name in parts]

    def box(self, x):
        """Scores, with the background last, and deltas of the classes."""
        for i in range(4):
            x = F.relu(self._normalized(x, self.names["box_conv"](i), 3))
        x = F.relu(self._plain(F.linear, x.flatten(1), self.names["fc"]))
        scores, deltas = (self._plain(F.linear, x, self.names[part]) for part in ("cls", "reg"))
        if self.background_first:
            classes = scores.shape[1] - 1
            order = [*range(1, classes + 1), 0]
            scores = scores[:, order]
            deltas = deltas.view(len(x), classes + 1, 4)[:, 1:].flatten(1)
        return scores, deltas

    def mask(self, x):
        for i in range(4):
            x = F.relu(self._normalized(x, self.names["mask_conv"](i), 3))
        x = F.relu(self._plain(F.conv_transpose2d, x, self.names["deconv"], stride=2))
        x = self._plain(F.conv2d, x, self.names["mask"])
        return x[:, 1:] if self.background_first else x


MMDETECTION = {
    "resnet": {"prefix": "backbone.", "norm": "gn"},
    "lateral": lambda i: (f"neck.lateral_convs.{i}.conv", f"neck.lateral_convs.{i}.gn"),
    "output": lambda i: (f"neck.fpn_convs.{i}.conv", f"neck.fpn_convs.{i}.gn"),
    "rpn": "rpn_head.rpn_conv",
    "objectness": "rpn_head.rpn_cls",
    "deltas": "rpn_head.rpn_reg",
    "box_conv": lambda i: tuple(
        f"roi_head.bbox_head.shared_convs.{i}.{part}" for part in ("conv", "gn")
    ),
    "fc": "roi_head.bbox_head.shared_fcs.0",
    "cls": "roi_head.bbox_head.fc_cls",
    "reg": "roi_head.bbox_head.fc_reg",
    "mask_conv": lambda i: tuple(f"roi_head.mask_head.convs.{i}.{p}" for p in ("conv", "gn")),
    "deconv": "roi_head.mask_head.upsample",
    "mask": "roi_head.mask_head.conv_logits",
}

_BOX = "roi_heads.box.feature_extractor."
_MASK = "roi_heads.mask.feature_extractor."
MASKRCNN_BENCHMARK = {
    "resnet": {"prefix": "backbone.body.", "norm": "bn", "stem": "stem."},
    "lateral": lambda i: tuple(f"backbone.fpn.fpn_inner{i + 1}.{part}" for part in (0, 1)),
    "output": lambda i: tuple(f"backbone.fpn.fpn_layer{i + 1}.{part}" for part in (0, 1)),
    "rpn": "rpn.head.conv",
    "objectness": "rpn.head.cls_logits",
    "deltas": "rpn.head.bbox_pred",
    "box_conv": lambda i: (f"{_BOX}xconvs.{3 * i}", f"{_BOX}xconvs.{3 * i + 1}"),
    "fc": f"{_BOX}fc6",
    "cls": "roi_heads.box.predictor.cls_score",
    "reg": "roi_heads.box.predictor.bbox_pred",
    "mask_conv": lambda i: (f"{_MASK}mask_fcn{i + 1}.0", f"{_MASK}mask_fcn{i + 1}.1"),
    "deconv": "roi_heads.mask.predictor.conv5_mask",
    "mask": "roi_heads.mask.predictor.mask_fcn_logits",
}
