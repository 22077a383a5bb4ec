"""The end of the main job: prune, share and save the model that training left.

python -m launch.finish out/dgc/model.safetensors out/dgc/model.dgc
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

import dgc
from launch import fashion_mnist, models
from launch.compress import Recipe, accuracy, compress_model

# Layers differ in how much of them can go; what the paper found for LeNets, tuned a little.
DENSITIES = {
    "lenet300": {"1": 0.06, "3": 0.09, "5": 0.26},
    "lenet5": {"0": 0.7, "2": 0.2, "5": 0.05, "7": 0.19},
    "resnet20": 0.3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, help="the model.safetensors of launch.train")
    parser.add_argument("out", type=Path, help="the compressed file to write")
    parser.add_argument("--data", help="folder of IDX files; found or fetched where left out")
    parser.add_argument("--model", choices=models.MODELS, default="lenet5")
    parser.add_argument("--epochs", type=float, default=4.0, help="of retraining while pruning")
    args = parser.parse_args()
    data = fashion_mnist.load(args.data)
    model = models.build(args.model)
    model.load_state_dict(load_file(args.trained))
    recipe = Recipe(
        density=DENSITIES[args.model],
        prune_epochs=args.epochs,
        share_epochs=args.epochs / 4,
        lr=3e-3,
        distill_weight=0.9,
    )
    _, report = compress_model(model, data, args.out, recipe)
    print(report)
    fresh = models.build(args.model, seed=1)
    dgc.load(fresh, args.out)
    percent = accuracy(fresh, data.test_images, data.test_labels)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, loaded again: {percent:.2f} %")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
