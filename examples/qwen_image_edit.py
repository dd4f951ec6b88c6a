"""Qwen-Image-Edit, with sparse attention among the tokens of the result and of the image that is edited.

pip install 'rainfusion[diffusers]' transformers accelerate
python examples/qwen_image_edit.py --image boat.jpg --prompt 'make the boat red'
python examples/qwen_image_edit.py --tiny    # no download: a tiny model with random weights
"""

import argparse

import tiny
import torch
from diffusers import QwenImageEditPipeline
from diffusers.utils import load_image
from PIL import Image

from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion


def public():
    """The public checkpoint, with about 8,200 tokens: half of them are the image that is edited."""
    pipe = QwenImageEditPipeline.from_pretrained("Qwen/Qwen-Image-Edit", torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    config = RainFusionConfig(sparsity=0.6, dense_steps=(8, 0), omitted="summary")
    return pipe, config, {"num_inference_steps": 50}


def main() -> None:
    """Edit an image, and say what was skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="file or address of the image; default: a grey one")
    parser.add_argument("--prompt", default="make it a paper boat on a rain-soaked street")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, without a download")
    args = parser.parse_args()

    pipe, config, settings = tiny.qwen_image_edit() if args.tiny else public()
    image = load_image(args.image) if args.image else Image.new("RGB", (1024, 1024), "grey")
    handle = apply_rainfusion(pipe, config)
    edited = pipe(image, args.prompt, negative_prompt=" ", true_cfg_scale=4.0, **settings).images[0]

    report = handle.report()
    print(report)
    report.heatmap("qwen_image_edit_density.png")
    edited.save("qwen_image_edit.png")


if __name__ == "__main__":
    main()
