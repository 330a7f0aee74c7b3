"""Compiles every Triton kernel for a GPU, which needs none: the interpreter checks no types.

In a process of its own, because the interpreter is chosen when Triton is imported.
"""

import re
import sys

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from wsbcn_d2.ops import triton_backend
from wsbcn_d2.ops import triton_kernels as kernels

HALF = ("x_ptr", "y_ptr", "residual_ptr", "grad_ptr", "grad_x_ptr", "grad_residual_ptr")
POINTERS = {
    "skipped_ptr": "*i64",
    "flags_ptr": "*i32",
    "out_ptr": "*fp32",
}
FLOATS = ("values", "group_values", "update_rate", "eps")
# Arguments that can be 1, for which Triton compiles a variant with the constant in their place.
ONES = ("channels", "groups", "pixels", "tiles", "rows", "part", "parts", "work")
ACTIVATION = [
    {"HAS_RESIDUAL": residual, "FROM_OUTPUT": output, "RELU": relu}
    for residual, output, relu in (
        (False, False, False),
        (False, False, True),
        (False, True, True),
        (True, True, True),
        (True, False, False),
    )
]
TABLES = [{"GROUPS": 1, "SIZE": 8, "BLOCK_S": 64}, {"GROUPS": 32, "SIZE": 8, "BLOCK_S": 1}]
# Whether the tiles find out the tables by themselves: not, or groups of fewer channels than a tile
# has, or of more.
GROUPS = [
    {"FUSED": False, "SIZE": 1, "BLOCK_S": 1},
    {"FUSED": True, "SIZE": 1, "BLOCK_S": 1},
    {"FUSED": True, "SIZE": 8, "BLOCK_S": 4},
]
STATISTICS = [
    {"UPDATE": update, "POOL": pool, "BLOCK_R": 4}
    for update, pool in ((True, True), (True, False), (False, False))
]
VARIANTS = {
    "moments_kernel": [
        {"UPDATE": update, "SINGLE": single}
        for update, single in ((True, True), (True, False), (False, False))
    ],
    "pool_kernel": [{"AROUND_ESTIMATE": e, "BLOCK_R": 64, "BLOCK_C": 16} for e in (True, False)],
    "forward_tables_kernel": [{"UPDATE": u, **t} for u, t in zip((True, False), TABLES)],
    "apply_kernel": [
        {"HAS_RESIDUAL": residual, "RELU": relu, "BLOCK_U": 256, **statistics, **groups}
        for residual, relu, statistics, groups in (
            (True, True, STATISTICS[0], GROUPS[1]),
            (False, False, STATISTICS[0], GROUPS[2]),
            (False, True, STATISTICS[1], GROUPS[2]),
            (True, False, STATISTICS[1], GROUPS[0]),
            (True, True, STATISTICS[2], GROUPS[2]),
            (False, True, STATISTICS[2], GROUPS[0]),  # an output once more
        )
    ],
    "sums_kernel": ACTIVATION,
    "backward_tables_kernel": TABLES,
    "input_grad_kernel": [{**a, **g} for a, g in zip(ACTIVATION, GROUPS + GROUPS[1:])],
}


def compile_kernel(kernel, constants, half, ones, target):
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in ones:
            signature[name], values[name] = "constexpr", constants.get(name, 1)
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, half if name in HALF else "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    return compile(source, target=target).asm["ptx"]


def main():
    assert not triton_backend.INTERPRETED
    missing = set(VARIANTS) ^ {n for n in vars(kernels) if re.fullmatch(r"\w+_kernel", n)}
    assert not missing, missing
    for capability in (70, 90):
        target = GPUTarget("cuda", capability, 32)
        for name, variants in VARIANTS.items():
            for variant in variants:
                # long rows, channels_last, RoIs, one value
                for tile in ((1, 2048), (128, 16), (32, 64), (1, 1)):
                    if "BLOCK_C" not in kernels.__dict__[name].arg_names or "BLOCK_C" in variant:
                        tile = None
                    constants = {"COMPUTE": tl.float32, **variant}
                    if tile is not None:
                        constants.update(BLOCK_C=tile[0], BLOCK_P=tile[1])
                        constants["CHANNELS_LAST"] = tile == (128, 16)
                        constants["ALIGN"] = 8 if tile == (1, 2048) else 1
                        if "SIZE" in variant:  # else a program is for whole groups
                            constants["GROUPS"] = max(tile[0] // variant["SIZE"], 1)
                    ones = ONES if tile in (None, (1, 1)) else ()
                    half = "*fp16" if capability == 70 else "*bf16"
                    ptx = compile_kernel(getattr(kernels, name), constants, half, ones, target)
                    assert "st.global" in ptx
                    if tile is None:
                        compile_kernel(getattr(kernels, name), constants, half, (), target)
                        break
    print("compiled")


if __name__ == "__main__":
    sys.exit(main())
