# %% [markdown]
# # From one norm string to an exported model
#
# Train a small Mask R-CNN twice at 1 image per step, with GN and with BCN+WS. Compare the two, look
# at their predictions, and export one. `make tutorial` runs this file in about a minute on 2 CPU
# cores. VS Code, PyCharm and Spyder open it as a notebook, cell by cell,
# with the root of the repository as the working folder.

# %%
import os
from pathlib import Path

import torch
from detectron2.utils.env import seed_all_rng
from PIL import Image

import wsbcn_d2  # Detectron2 now knows the norm options
from demo.digits import make_digits_dataset  # of this repository
from wsbcn_d2 import model_zoo
from wsbcn_d2.analysis import compare_runs, read_run
from wsbcn_d2.analysis.comparison_page import comparison_page
from wsbcn_d2.engine import Trainer, load_config
from wsbcn_d2.export.stock import save_for_detectron2
from wsbcn_d2.visualization import draw_comparison, load_predictions

STEPS = int(os.environ.get("TUTORIAL_STEPS", 40))  # 1000 and more to see the models learn
OUTPUT = Path(os.environ.get("TUTORIAL_OUTPUT", "output/tutorial"))

# %% [markdown]
# ## Data
#
# Handwritten digits on photographs, in COCO's format: annotation files and folders of images. Your
# own dataset takes their place; the config names it.

# %%
root = make_digits_dataset(str(OUTPUT / "digits"), num_train=100, num_val=10)
DATASETS = tuple(
    (f"tutorial_{part}", f"{root}/annotations/instances_{part}.json", f"{root}/{part}")
    for part in ("train", "val")
)
Image.open(next(Path(root, "train").iterdir()))

# %% [markdown]
# ## One norm string
#
# A config of this repository, and the norm in the four parts of the model that have one.


# %%
def make_config(norm):
    name = "Digits-InstanceSegmentation/mask_rcnn_R_18_FPN_bcn_ws.yaml"
    options = ["DATASETS.COCO_FORMAT", DATASETS]
    options += ["DATASETS.TRAIN", ("tutorial_train",), "DATASETS.TEST", ("tutorial_val",)]
    options += ["SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", (), "OUTPUT_DIR", str(OUTPUT / norm)]
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        options += [f"MODEL.{part}.NORM", norm]
    return load_config(model_zoo.get_config_file(name), options)


# %% [markdown]
# ## Train
#
# `Trainer` is Detectron2's, with what BCN needs. It evaluates at the end, and `summarize` says what
# the model is made of: standardized convolutions, and never the predictors.

# %%
NORMS = ("GN", "BCN+WS")
models = {}
for norm in NORMS:
    cfg = make_config(norm)
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.train()
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())  # for the comparison
    models[norm] = trainer.model

for norm, model in models.items():
    print(f"{norm}: {wsbcn_d2.summarize(model) or 'stock layers'}")

# %% [markdown]
# ## Compare
#
# AP with intervals over images. One run of each norm says nothing of seeds, and 40 steps nothing of
# the norms. `tools/compare.py` is the same on the command line.

# %%
runs = [read_run(str(OUTPUT / norm)) for norm in NORMS]
results = compare_runs(runs, NORMS, num_draws=100)
for path in comparison_page(results).write(str(OUTPUT), "comparison"):
    print(path)
Image.open(OUTPUT / "comparison-ap.png")

# %% [markdown]
# ## Look
#
# Ground truth and predictions, where the two models differ most. After 40 steps there is hardly a
# prediction: set `TUTORIAL_STEPS=1000`.

# %%
predictions = [
    load_predictions(str(OUTPUT / norm / "inference" / "coco_instances_results.json"))
    for norm in NORMS
]
picture = str(OUTPUT / "predictions.png")
draw_comparison("tutorial_val", predictions, NORMS, picture, num_images=3, score_threshold=0.1)
Image.open(picture)

# %% [markdown]
# ## Export
#
# `fold` makes stock layers of the trained ones, with the same outputs up to rounding. The folder
# needs Detectron2 and nothing of this package; `tools/export_model.py` writes TorchScript and ONNX.

# %%
model = models["BCN+WS"].eval()
folded = wsbcn_d2.fold(model)
image = torch.rand(1, 3, 64, 64, device=next(model.parameters()).device)
with torch.no_grad():
    for name, feature in folded.backbone(image).items():
        torch.testing.assert_close(feature, model.backbone(image)[name], rtol=1e-3, atol=1e-3)
save_for_detectron2(folded, make_config("BCN+WS"), str(OUTPUT / "folded"))
print(*sorted(path.name for path in (OUTPUT / "folded").iterdir()))
