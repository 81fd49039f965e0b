"""Box-Muller's exact mathematics, to 60 decimal digits."""

from __future__ import annotations

from decimal import Decimal, localcontext

PI = "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"


def exact_normals(word_a: int, word_b: int) -> list[Decimal]:
    """Box-Muller to 60 digits, by another road: no reduction of the angle, decimal logarithm."""
    with localcontext() as context:
        context.prec = 60
        radius = (-2 * ((Decimal(word_a) + Decimal("0.5")) / 2**32).ln()).sqrt()
        angle = 2 * Decimal(PI) * word_b / 2**32
        if word_b % 2**30 == 0:  # whole quarter turns, where 80 digits of pi are not enough
            cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[word_b >> 30]
            return [radius * cos, radius * sin]
        term, sums, k = Decimal(1), [Decimal(0)] * 2, 0  # e^{i angle} by its power series
        while abs(term) > Decimal(10) ** -58:
            sums[k % 2] += -term if k & 2 else term
            k += 1
            term = term * angle / k
        return [radius * sums[0], radius * sums[1]]
