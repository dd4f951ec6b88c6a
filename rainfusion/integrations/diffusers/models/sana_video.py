"""Sana-Video and Sana-WM: linear and recurrent attention, which has no blocks to skip."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import leave_alone

leave_alone("SanaVideoTransformer3DModel", "its attention is linear")
leave_alone("SanaWMTransformer3DModel", "most of its attention is linear or recurrent")
