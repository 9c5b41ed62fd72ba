"""Scores with a file of fastalps-export, by ONNX Runtime alone (pip install onnxruntime).

python score_onnx.py FILE.onnx PIXELS.npy     PIXELS: images (N, C, H, W) or frames (N, H, W)
"""

import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=onnxruntime.get_available_providers())
facts = session.get_modelmeta().custom_metadata_map
pixels = np.load(sys.argv[2], mmap_mode="r")
threshold = float(facts.get("threshold", "inf"))
print(facts["threshold_means"], file=sys.stderr)
print("item,score,flagged")
for start in range(0, len(pixels), 64):  # any number at a time
    inputs = {session.get_inputs()[0].name: np.ascontiguousarray(pixels[start : start + 64])}
    scores = session.run(None, inputs)[0]  # scores (n,) of images, patch_scores (n, P) of frames
    for item, score in enumerate(scores.reshape(len(scores), -1).max(1), start):
        print(f"{item},{score:.9g},{int(score > threshold)}")
