"""Made arms, training curves and times for the tests of the frontier's page and pictures; hostile text among them."""

from __future__ import annotations

import random
import shutil

from long2short.frontier import Arm
from long2short.report import StageTime, TrainingCurve
from rl.evaluate import summarize
from rl.tasks import tiny
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

PIECES = (
    "<script>window.hacked=1</script>",
    "<img src=x onerror=\"window.hacked=1\"><svg/onload='window.hacked=1'>",
    "</pre></div><iframe src='https://example.com'></iframe><style>body{display:none}</style>",
    "abc \u202edcba\u202c \u2066x\u2069 NUL \x00 bell \x07 BOM \ufeff lone \ud800 end \u2028 line",
    "{{ 7*7 }}{% raw %} ]]> <!-- <script> &lt;b&gt; مرحبا 你好 </script><script>window.hacked=1</script>",
)
HOSTILE = ("\n".join(PIECES), "L" * 100_000)
WORDS = (
    "so",
    "07+15=22",
    "wait,",
    "<think>",
    "</think>",
    "\\frac{1}{2}",
    "κόσμε",
    "数学",
    "🙂",
    "مرحبا",
    "&amp;",
    "\n",
    *PIECES,
)


def varied_text(rng, least=200, most=1_500):
    """Text of a random length, `least` to `most` characters, with hostile pieces and many scripts in it."""
    wanted, words = rng.randint(least, most), []
    while wanted > sum(map(len, words)) + len(words):
        words.append(rng.choice(WORDS) if rng.random() < 0.3 else f"{rng.getrandbits(40):x}")
    return " ".join(words)[:wanted]


def make_arm(name, chance, tokens, texts=("1+1=2 </think>02",), label="", problems=30, samples=2, levels=(2,)):
    """An arm whose completions have about `tokens` tokens and are right with this chance; the same one every time."""
    rng = random.Random(name)
    groups = []
    for number in range(problems):
        rollouts = []
        for sample in range(samples):
            length = max(1, round(rng.gauss(tokens, tokens / 8)))
            verdict = Verdict(Outcome.RIGHT) if rng.random() < chance else Verdict(Outcome.WRONG, texts[0][:40])
            text = texts[(number + sample) % len(texts)]
            reason = FinishReason.STOP if verdict.right else FinishReason.LENGTH
            rollouts.append(Rollout(Completion(text, tuple(range(length)), (0.0,) * length, reason), verdict))
        question = TextPart(f"{number:02d}+01 {texts[number % len(texts)]}")
        problem = Problem(f"p{number}", (question,), "02", level=levels[number % len(levels)])
        groups.append(RolloutGroup(problem, (1,), tuple(rollouts)))
    return Arm(name, tuple(groups), summarize(groups, tiny.TASK), label)


CURVES = (
    TrainingCurve(
        "teacher",
        tuple({"step": i, "reward": i / 9, "accuracy": 0.5, "tokens_mean": 9.0 + i} for i in range(9)),
        ("teacher",),
    ),
    TrainingCurve("brief", ({"step": 1, "reward": 0.5, "accuracy": None, "loss": 1.0},), ("brief",)),
    TrainingCurve("sft", ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})),
)
TIMES = (StageTime("teacher", "grpo", 171.3), StageTime("<b>sft</b>", "sft", 3.2))

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
