"""Draw docs/img/ablations.png: `python docs/img/ablations.py` (needs matplotlib).

The numbers are from docs/LOG.md: the paper's ablations (2026-11-23; at 32k tokens 2026-11-27), layers and the last
hidden state (2026-11-26).
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

LONG_STEPS = [0, 10, 20, 30, 40, 50, 60]
LONG_KL = {
    "with offsets before": [1.916, 1.917, 1.891, 1.881, 1.867, 1.850, 1.847],
    "without": [1.931, 1.930, 1.899, 1.889, 1.876, 1.859, 1.855],
}
FAR_STEPS = [0, *range(20, 321, 20)]
FAR_KL = {
    "with offsets before": [
        *(1.749, 1.586, 1.564, 1.612, 1.614, 1.620, 1.569, 1.568, 1.575),
        *(1.533, 1.516, 1.495, 1.476, 1.466, 1.459, 1.455, 1.455),
    ],
    "without": [
        *(1.781, 1.600, 1.562, 1.614, 1.617, 1.618, 1.568, 1.568, 1.569),
        *(1.530, 1.512, 1.491, 1.473, 1.464, 1.456, 1.453, 1.453),
    ],
}
CONTEXTS = [1024, 4096, 7168]
TAU = {
    "all of it": [2.71, 2.69, 2.56],
    "no offsets": [2.64, 2.74, 2.45],
    "lag 1 only": [2.64, 2.61, 2.45],
    "cross-entropy only": [2.59, 2.69, 2.54],
    "AdamW": [2.35, 2.59, 2.56],
}
LAGS = [1, 2, 3, 4, 5]
KL_BY_LAG = {
    "layer 18": [2.416, 2.533, 2.600, 2.649, 2.689],
    "layer 18, hidden state": [2.033, 2.317, 2.473, 2.592, 2.692],
    "layer 22": [2.470, 2.480, 2.496, 2.513, 2.530],
    "layer 20": [2.320, 2.358, 2.400, 2.442, 2.485],
    "layer 16": [2.107, 2.129, 2.160, 2.192, 2.223],
    "layers 4, 10, 16, 22": [1.994, 2.054, 2.113, 2.170, 2.224],
    "…, hidden state": [1.570, 1.780, 1.942, 2.089, 2.217],
}


def main() -> None:
    figure = Figure(figsize=(19, 4.2), layout="constrained")
    stage, far, lengths, layers = figure.subplots(1, 4)
    for name, values in LONG_KL.items():
        stage.plot(LONG_STEPS[: len(values)], values, marker="o", markersize=3, label=name)
    stage.set(title="SmolLM2: the long stage (7,168)", xlabel="step", ylabel="held-out KL")
    for name, values in FAR_KL.items():
        far.plot(FAR_STEPS, values, marker="o", markersize=3, label=name)
    far.set(title="Qwen 0.5B: the long stage (32,768)", xlabel="step", ylabel="held-out KL")
    for name, values in TAU.items():
        lengths.plot(CONTEXTS, values, marker="o", markersize=3, label=name)
    lengths.set(title="SmolLM2: after 250 short steps", xlabel="context, tokens", ylabel="accept length τ (± 0.2)")
    for name, values in KL_BY_LAG.items():
        layers.plot(LAGS, values, marker="o", markersize=3, label=name)
    layers.set(title="Qwen 0.5B: what a draft reads", xlabel="lag, tokens", ylabel="held-out KL", xticks=LAGS)
    for axes in (stage, far, lengths, layers):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
