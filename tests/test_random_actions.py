"""A model goes through random actions beside a naive twin, and is compared with it after each.

The twin is the formulas in float64, one after the other, by autograd: no layers, no fusion, nothing
that it could remember. After each action it takes over the state of the model, so that roundings do
not add up; what the model itself may have kept of earlier actions stays.

    python tests/test_random_actions.py SEEDS [ACTIONS]

goes through more of them, and names the seed and the actions of a failure.
"""

import copy
import io
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import vector_to_parameters
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # as a script

from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock  # noqa: E402
from oracles import estimated_bcn, large_batch_bcn, standardized_weight  # noqa: E402

from wsbcn_d2 import BatchChannelNorm, WSConv2d  # noqa: E402

PARTS = ("stem", "basic", "bottleneck", "large_batch")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = BasicStem(3, 8, norm="BCN(groups=4)+WS")
        self.basic = BasicBlock(8, 16, stride=2, norm="BCN(groups=4, update_rate=0.3)+WS")
        self.bottleneck = BottleneckBlock(16, 16, bottleneck_channels=8, norm="BCN(groups=2)+WS")
        self.large_batch = BasicBlock(16, 16, norm="BatchBCN(groups=8)")
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x, checkpointed=(), use_reentrant=False):
        for name in PARTS:
            part = getattr(self, name)
            if name in checkpointed:
                x = checkpoint(part, x, use_reentrant=use_reentrant)
            else:
                x = part(x)
        return self.last(x)


class Twin:
    """The formulas, with the parameters and buffers of the model in ``values``."""

    def __init__(self, model):
        self.model = model
        self.values = {}
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            self.values[name] = value.detach().double().clone()
        for name, p in model.named_parameters():
            self.values[name].requires_grad_(p.requires_grad)

    def leaves(self):
        return {name: v for name, v in self.values.items() if v.requires_grad}

    def conv(self, name, x):
        conv, values = self.model.get_submodule(name), self.values
        weight = values[f"{name}.weight"]
        if isinstance(conv, WSConv2d):
            weight = standardized_weight(weight, conv.eps)
        return self.norm(f"{name}.norm", F.conv2d(x, weight, None, conv.stride, conv.padding))

    def norm(self, name, x):
        layer, values = self.model.get_submodule(name), self.values
        affine = [values[f"{name}.{key}"] for key, _ in layer.named_parameters()]
        mean, var = values[f"{name}.running_mean"], values[f"{name}.running_var"]
        training = layer.training and any(p.requires_grad for p in affine)
        oracle = large_batch_bcn if training and layer.mode == "batch" else estimated_bcn
        if not x.numel():
            return x * affine[0].sum() * affine[1].sum() * affine[2].sum() * affine[3].sum()
        rate = layer.update_rate if training else None
        result = oracle(x, *affine, mean, var, rate)
        new = torch.stack([result.running_mean, result.running_var]).detach()
        good = new.isfinite().all() and new.abs().max() < 3e38
        if training and good:
            values[f"{name}.running_mean"], values[f"{name}.running_var"] = new
            values[f"{name}.seen_elements"] += x.numel() // x.shape[1]
        elif training:
            values[f"{name}.skipped_updates"] += 1
        return result.y

    def part(self, name, x):
        if name == "stem":
            return F.max_pool2d(self.conv("stem.conv1", x).relu(), 3, 2, 1)
        block = self.model.get_submodule(name)
        convs = ["conv1", "conv2", "conv3"][: 3 if hasattr(block, "conv3") else 2]
        shortcut = x if block.shortcut is None else self.conv(f"{name}.shortcut", x)
        for conv in convs[:-1]:
            x = self.conv(f"{name}.{conv}", x).relu()
        return (self.conv(f"{name}.{convs[-1]}", x) + shortcut).relu()

    def __call__(self, x, **_):
        x = x.double()
        for name in PARTS:
            x = self.part(name, x)
        return F.conv2d(x, self.values["last.weight"], self.values["last.bias"])


def loss_of(y):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return (y * weights).sum() + 0.1 * y.square().mean() * bool(y.numel())


def assert_near(ours, theirs, what, tolerance):
    top = theirs.abs().max().clamp(min=1e-3) if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours.detach().double() / top,
        theirs.detach() / top,
        rtol=0,
        atol=tolerance,
        msg=lambda text: f"{what}: {text}",
    )


class Run:
    """One sequence of actions."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.model = Model()
        for p in self.model.parameters():
            nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
        self.handles, self.seen, self.history = [], [], []

    # ------------------------------------------------------------------------------- comparison

    def images(self, n=None):
        n = self.random.choice([1, 1, 2]) if n is None else n
        size = self.random.choice([12, 16, 21])
        x = torch.randn(n, 3, size, size + 3) * 2 + 1
        if self.random.random() < 0.3:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def compare_buffers(self, twin, tolerance=1e-3):
        for name, buffer in self.model.named_buffers():
            assert_near(buffer, twin.values[name].double(), name, tolerance)

    def compare_gradients(self, gradients, expected, tolerance=3e-3):
        assert gradients.keys() == expected.keys()
        for name, grad in gradients.items():
            assert_near(grad, expected[name], f"gradient of {name}", tolerance)

    def gradients(self):
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def step(self, views=1, **options):
        """Forward passes, a backward pass, and a step by hand."""
        self.model.zero_grad()
        twin, inputs = Twin(self.model), [self.images() for _ in range(views)]
        theirs = [twin(x) for x in inputs]
        leaves = twin.leaves()
        if not leaves:
            return
        expected = torch.autograd.grad(sum(map(loss_of, theirs)), list(leaves.values()))
        # Reentrant checkpointing gives gradients only if its input needs one.
        ours = [self.model(x.clone().requires_grad_(), **options) for x in inputs]
        sum(map(loss_of, ours)).backward()
        for y, other in zip(ours, theirs):
            assert_near(y, other, "output", 1e-3)
        self.compare_gradients(self.gradients(), dict(zip(leaves, expected)))
        self.compare_buffers(twin)
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad / (p.grad.norm() + 1)

    # ---------------------------------------------------------------------------------- actions

    def train(self):
        self.step()

    def several_views(self):
        self.step(views=2)

    def checkpoint(self):
        parts = self.random.sample(PARTS, self.random.randint(1, 4))
        options = {"checkpointed": parts, "use_reentrant": self.random.random() < 0.5}
        self.step(views=self.random.choice([1, 2, 3]), **options)

    def evaluate(self):
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        x, twin = self.images(), Twin(self.model)
        with torch.no_grad() if self.random.random() < 0.7 else torch.enable_grad():
            assert_near(self.model(x), twin(x), "output", 1e-3)
        self.compare_buffers(twin, 0)
        for module, mode in modes.items():
            module.training = mode

    def forward_only(self):
        x, twin = self.images(), Twin(self.model)
        with torch.no_grad():
            assert_near(self.model(x), twin(x), "output", 1e-3)
        self.compare_buffers(twin)

    def partial_backward(self):
        twin, x = Twin(self.model), self.images()
        leaves = twin.leaves()
        if not leaves:
            return
        ours, theirs = loss_of(self.model(x)), loss_of(twin(x))
        parameters = dict(self.model.named_parameters())
        for _ in range(2):
            names = self.random.sample(sorted(leaves), self.random.randint(1, len(leaves)))
            found = torch.autograd.grad(ours, [parameters[n] for n in names], retain_graph=True)
            expected = torch.autograd.grad(theirs, [leaves[n] for n in names], retain_graph=True)
            self.compare_gradients(dict(zip(names, found)), dict(zip(names, expected)))
        self.compare_buffers(twin)

    def accumulate(self):
        """Several graphs, whose backward passes come in another order."""
        self.model.zero_grad()
        twin, inputs = Twin(self.model), [self.images() for _ in range(3)]
        leaves = twin.leaves()
        if not leaves:
            return
        losses = [loss_of(self.model(x)) for x in inputs]
        total = sum(loss_of(twin(x)) for x in inputs)
        expected = torch.autograd.grad(total, list(leaves.values()))
        for loss in self.random.sample(losses, 3):
            loss.backward()
        self.compare_gradients(self.gradients(), dict(zip(leaves, expected)))
        self.compare_buffers(twin)

    def edit_weights(self):
        conv = self.random.choice([m for m in self.model.modules() if isinstance(m, WSConv2d)])
        weight, new = conv.weight, torch.randn_like(conv.weight)
        how = self.random.randrange(7)
        if how == 0:
            weight.data.mul_(-1.5).add_(new)
        elif how == 1:
            weight.data = new
            weight.data = new * 2
        elif how == 2:
            with torch.no_grad():
                weight.set_(new)
        elif how == 3:
            weight.detach().numpy()[...] += 0.5 * new.numpy()
        elif how == 4:
            vector = torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])
            vector_to_parameters(vector + 0.1 * torch.randn_like(vector), self.model.parameters())
        elif how == 5:
            conv.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
        else:
            with torch.inference_mode():
                weight.add_(new)
        self.evaluate()

    def load(self):
        state = {
            name: value if name.endswith("ws_eps") else value + 0.2 * torch.rand_like(value)
            for name, value in self.model.state_dict().items()
        }
        self.model.load_state_dict(state, assign=False)
        self.evaluate()

    def copy(self):
        if self.handles:
            return  # whose functions do not pickle
        how = self.random.randrange(3)
        if how == 0:
            self.model = copy.deepcopy(self.model)
        elif how == 1:
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            buffer.seek(0)
            self.model = torch.load(buffer, weights_only=False)
        self.evaluate()

    def hook(self):
        if self.handles and self.random.random() < 0.6:
            self.handles.pop().remove()
            return
        modules = [m for m in self.model.modules() if isinstance(m, (WSConv2d, BatchChannelNorm))]
        module = self.random.choice(modules)
        see = lambda m, x, y: self.seen.append(type(m))  # noqa: E731
        self.handles.append(module.register_forward_hook(see))
        self.seen.clear()
        self.evaluate()
        assert type(module) in self.seen

    def freeze(self):
        module = self.random.choice(list(self.model.modules()))
        module.requires_grad_(self.random.random() < 0.6)

    def mode(self):
        self.random.choice(list(self.model.modules())).train(self.random.random() < 0.7)

    def memory_format(self):
        formats = (torch.contiguous_format, torch.channels_last)
        self.model.to(memory_format=self.random.choice(formats))

    def mixed_precision(self):
        self.model.zero_grad()
        twin, x = Twin(self.model), self.images()
        leaves = twin.leaves()
        if not leaves:
            return
        with torch.autocast("cpu", torch.bfloat16):
            y = self.model(x)
        assert y.dtype == torch.bfloat16
        loss_of(y.float()).backward()
        theirs = twin(x)
        assert (y.double() - theirs).norm() < 0.2 * theirs.norm() + 0.1
        self.compare_buffers(twin, 0.1)
        assert all(g.isfinite().all() for g in self.gradients().values())

    def empty(self):
        self.model.zero_grad()
        twin = Twin(self.model)
        y = self.model(self.images(0))
        assert y.shape[0] == 0
        if y.requires_grad:
            loss_of(y).backward()
            assert not any(g.any() for g in self.gradients().values())
        self.compare_buffers(twin, 0)

    def not_finite(self):
        twin, x = Twin(self.model), self.images()
        x[0, 1, 2, 3] = self.random.choice([float("nan"), float("inf")])
        y = self.model(x)
        if y.requires_grad:
            loss_of(y).backward()
        twin(x)
        self.compare_buffers(twin)

    def exception(self):
        """A forward pass that ends halfway."""
        twin, x = Twin(self.model), self.images()
        at = self.random.randrange(len(PARTS))

        def fail(*_):
            raise KeyboardInterrupt

        handle = getattr(self.model, PARTS[at]).register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            self.model(x)
        handle.remove()
        z = x.double()
        for name in PARTS[:at]:
            z = twin.part(name, z)
        self.compare_buffers(twin)

    ACTIONS = [train, several_views, checkpoint, evaluate, forward_only, partial_backward]
    ACTIONS += [accumulate, edit_weights, load, copy, hook, freeze, mode, memory_format]
    ACTIONS += [mixed_precision, empty, not_finite, exception]

    def go(self, actions):
        for _ in range(actions):
            action = self.random.choice(self.ACTIONS)
            self.history.append(action.__name__)
            action(self)


@pytest.mark.parametrize("seed", range(4))
def test_same_as_the_twin(seed):
    run = Run(seed)
    try:
        run.go(60)
    except BaseException:
        print("actions:", " ".join(run.history))
        raise
    assert len(set(run.history)) > 12


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in range(int(sys.argv[1])):
        run = Run(seed)
        try:
            run.go(int(sys.argv[2]) if len(sys.argv) > 2 else 200)
        except BaseException:
            print(f"seed {seed}, actions: {' '.join(run.history)}")
            raise
        print(f"seed {seed}: {len(run.history)} actions", flush=True)
