"""One-class detectors of scikit-learn on the same splits; none has seen a validation image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastalps.ops import per_sample_mse
from fastalps.smoothing import smoothed_errors

# As many components as the latent of the preset "paper" has.
PCA_COMPONENTS = 16


def scores(method: str, train: Tensor, test: Tensor, seed: int) -> dict[str, Tensor]:
    """Anomaly scores by kind, (M,) float32 of uint8 test images; higher = more anomalous.

    Args:
        method: "ocsvm" (RBF kernel, gamma "scale", nu 0.1), "iforest" (200 trees) or "pca" (mean
            squared error of the reconstruction from 16 components).
        train, test: uint8 (N, C, H, W).
        seed: of the forest.
    """
    x, y = (images.flatten(1).numpy().astype(np.float32) / 255 for images in (train, test))
    if method == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(PCA_COMPONENTS, random_state=seed).fit(x)
        rebuilt = pca.inverse_transform(pca.transform(y))
        images, rebuilt = (torch.from_numpy(a).float().view(test.shape) for a in (y, rebuilt))
        return {
            "normal": per_sample_mse(rebuilt, images),
            "smoothed_normal": smoothed_errors(images, rebuilt),
        }
    if method == "ocsvm":
        from sklearn.svm import OneClassSVM

        detector = OneClassSVM(nu=0.1, gamma="scale").fit(x)
    else:
        from sklearn.ensemble import IsolationForest

        detector = IsolationForest(n_estimators=200, random_state=seed).fit(x)
    return {"normal": torch.from_numpy(-detector.score_samples(y)).float()}
