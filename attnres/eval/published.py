"""The paper's reported scores: Table 3, base models after 1.4T tokens, in per cent."""

from typing import NamedTuple


class Published(NamedTuple):
    """The two columns of the paper's Table 3."""

    baseline: float
    attnres: float


TABLE_3 = {
    "mmlu": Published(73.5, 74.6),
    "mmlu_pro": Published(52.2, 52.2),
    "gpqa_diamond": Published(36.9, 44.4),
    "bbh": Published(76.3, 78.0),
    "arc_challenge": Published(64.6, 65.7),
    "hellaswag": Published(83.2, 83.4),
    "triviaqa": Published(69.9, 71.8),
    "gsm8k": Published(81.7, 82.4),
    "mgsm": Published(64.9, 66.1),
    "math": Published(53.5, 57.1),
    "cmath": Published(84.7, 85.1),
    "humaneval": Published(59.1, 62.2),
    "mbpp": Published(72.0, 73.9),
    "cmmlu": Published(82.0, 82.9),
    "ceval": Published(79.6, 82.5),
}
