"""Wan 2.1, image to video, with sparse self-attention.

pip install 'rainfusion[diffusers]' transformers accelerate ftfy imageio imageio-ffmpeg
python examples/wan_image_to_video.py --image boat.jpg
python examples/wan_image_to_video.py --tiny    # no download: a tiny model with random weights
"""

import argparse

import tiny
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from diffusers.utils import export_to_gif, export_to_video, load_image
from PIL import Image

from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion

CHECKPOINT = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"


def public():
    """The public checkpoint, with 32,760 tokens of video: 21 frames of 30x52."""
    vae = AutoencoderKLWan.from_pretrained(CHECKPOINT, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanImageToVideoPipeline.from_pretrained(CHECKPOINT, vae=vae, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    # The first frame is the image that is given: attention to it and from it is never skipped.
    config = RainFusionConfig(sparsity=0.75, dense_steps=(8, 0), sink="first_frame")
    return pipe, config, {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 40}


def main() -> None:
    """Make a video that begins with an image, and say what was skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="file or address of the first frame; default: a grey one")
    parser.add_argument("--prompt", default="the paper boat drifts away")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, without a download")
    args = parser.parse_args()

    pipe, config, sizes = tiny.wan_image_to_video() if args.tiny else public()
    size = sizes["width"], sizes["height"]
    image = load_image(args.image).resize(size) if args.image else Image.new("RGB", size, "grey")
    handle = apply_rainfusion(pipe, config)
    frames = pipe(image, args.prompt, guidance_scale=5.0, output_type="pil", **sizes).frames[0]

    report = handle.report()
    print(report)
    report.heatmap("wan_image_to_video_density.png")
    if args.tiny:
        export_to_gif(frames, "wan_image_to_video.gif")
    else:
        export_to_video(frames, "wan_image_to_video.mp4", fps=16)


if __name__ == "__main__":
    main()
