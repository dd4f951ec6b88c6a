"""Flux.1, text to image, with sparse attention among the tokens of the image.

pip install 'rainfusion[diffusers]' transformers accelerate sentencepiece protobuf
python examples/flux.py
python examples/flux.py --tiny    # no download: a tiny model with random weights
"""

import argparse

import tiny
import torch
from diffusers import FluxPipeline

from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion


def public():
    """The public checkpoint, with 8,160 tokens of an image of two million pixels.

    An image of a million pixels has 4,096 tokens, which are too few to gain anything: attention would stay dense.
    """
    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    config = RainFusionConfig(sparsity=0.6, dense_steps=(4, 0), omitted="summary")
    return pipe, config, {"height": 1088, "width": 1920, "num_inference_steps": 28}


def main() -> None:
    """Make an image, and say what was skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a paper boat on a rain-soaked street, close to the water")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, without a download")
    args = parser.parse_args()

    pipe, config, sizes = tiny.flux() if args.tiny else public()
    handle = apply_rainfusion(pipe, config)
    image = pipe(args.prompt, guidance_scale=3.5, **sizes).images[0]

    report = handle.report()
    print(report)
    report.heatmap("flux_density.png")
    image.save("flux.png")


if __name__ == "__main__":
    main()
