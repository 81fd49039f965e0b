"""Every constant of the noise, for ports: read from the code that computes with it.

`scalabl conformance export` writes them to constants.json. The letters are those of
docs/conformance.md.
"""

from __future__ import annotations

from typing import Any

from ..core import philox
from ..core.noise import FIRST_TRAINING_DRAW, NOISE_VERSION, RESERVED_LAYER
from .known_answers import box_muller_answers, philox_answers


def constants() -> dict[str, Any]:
    """The contents of constants.json: integers as numbers, binary64 as two texts (`_double`)."""
    scalars = {"sqrt_half": philox.SQRT_HALF, "ln_2": philox.LN_2, "turn": philox.TURN}
    series = {"L": philox.ATANH, "C": philox.COS, "S": philox.SIN}
    return {
        "noise_version": NOISE_VERSION,
        "philox": {
            "multipliers": list(philox.MULTIPLIERS),
            "key_steps": list(philox.KEY_STEPS),
            "rounds": philox.ROUNDS,
        },
        "reserved_layer": RESERVED_LAYER,
        "first_training_draw": FIRST_TRAINING_DRAW,
        **{name: _double(value) for name, value in scalars.items()},
        **{name: [_double(value) for value in values] for name, values in series.items()},
        "known_answers": {
            "philox4x32": [answer._asdict() for answer in philox_answers()],
            "box_muller": [
                {"words": answer.words, "normals": [_double(z) for z in answer.normals]}
                for answer in box_muller_answers()
            ],
        },
    }


def _double(value: float) -> dict[str, str]:
    """decimal: the shortest that a correct reader rounds to this number. hex: exact, C99's %a."""
    return {"decimal": repr(value), "hex": value.hex()}
