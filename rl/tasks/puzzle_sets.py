"""Which sets of reasoning-gym 0.1.25 (2505.24760) are used, and why the others are not. Standard library only.

reasoning-gym makes problems without end and scores answers itself. What its scorers do with an answer was read and
tried for each of its sets, at several seeds and levels: with the reference, with junk, with the question echoed, with
references that were changed a little, and with answers that would leave a file behind if they were run. A set is used
only if its reference earns 1, if otherwise only the right answer does, written differently or with words beside it, and
if the same seed makes the same problems in every process. The findings hold for this one version, and no other is
accepted.

A difficulty is 1, 2, ... and stands for a level of the set's curriculum there, taken alone and not with all lower ones.
Left out are levels that the set itself refuses, that take more than two seconds for each problem, whose questions or
answers have more than 20,000 or 8,000 characters, and in which three of four problems have the same answer. A set
without a curriculum has one difficulty.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import metadata

VERSION = "0.1.25"


class PuzzlesRefused(ValueError):
    """A puzzle set that is unknown or blocked, or no usable reasoning-gym; the message says which and what helps."""


@dataclass(frozen=True, slots=True)
class PuzzleSet:
    """A set that is used.

    Example: `PuzzleSet("modulo_grid", (0, 2, 3, 4, 5))`: difficulty 2 is level 2 of its curriculum, which refuses its
    own level 1.
    """

    name: str
    levels: tuple[int, ...] = (0, 1, 2, 3)  # of its curriculum, for difficulty 1, 2, ...; (0,) if it has none
    reads: tuple[str, ...] = ()  # what its scorer reads of an entry's metadata; a problem's spec holds only these
    tuples: bool = False  # these hold tuples, which the scorer tells from lists

    def nearest(self, difficulty: int) -> int:
        """The difficulty that it has for one that is asked for: that, or its highest."""
        return min(difficulty, len(self.levels))


def _levels(count: int) -> tuple[int, ...]:
    return tuple(range(count))


_OPEN = (
    PuzzleSet("ab"),
    PuzzleSet("acre", (0,)),
    PuzzleSet("advanced_geometry", reads=("task_type", "ortho", "incircle_radius_exact")),
    PuzzleSet("aiw", _levels(9)),
    PuzzleSet("arc_1d"),
    PuzzleSet("arc_agi", reads=("output",), tuples=True),
    PuzzleSet("base_conversion", _levels(5)),
    PuzzleSet("basic_arithmetic", _levels(5)),
    PuzzleSet("bf", _levels(3)),
    PuzzleSet("binary_alternation"),
    PuzzleSet("caesar_cipher", _levels(2)),
    PuzzleSet("calendar_arithmetic", reads=("task",)),
    PuzzleSet("chain_sum", _levels(11)),
    PuzzleSet("circuit_logic", _levels(2)),
    PuzzleSet("color_cube_rotation", _levels(5)),
    PuzzleSet("count_bits", _levels(5)),
    PuzzleSet("count_primes", _levels(5)),
    PuzzleSet("course_schedule", _levels(5)),
    PuzzleSet("cryptarithm", reads=("words_letters", "result_letters", "allow_leading_zero")),
    PuzzleSet("decimal_chain_sum", _levels(5)),
    PuzzleSet("dice"),
    PuzzleSet("emoji_mystery", _levels(6)),
    PuzzleSet("family_relationships", _levels(9)),
    PuzzleSet("figlet_font", _levels(1)),  # of a longer word, any 10 letters in their places earn 1
    PuzzleSet(
        "fraction_simplification", reads=("numerator", "denominator", "simplified_numerator", "simplified_denominator")
    ),
    PuzzleSet("futoshiki", _levels(3), reads=("solution",)),
    PuzzleSet("gcd", _levels(2)),
    PuzzleSet("group_anagrams", reads=("solution",)),
    PuzzleSet("kakurasu", _levels(3), reads=("row_sums", "col_sums", "n_rows", "n_cols")),
    PuzzleSet("knights_knaves"),
    PuzzleSet("largest_island", _levels(3)),
    PuzzleSet("lcm"),
    PuzzleSet("leg_counting", _levels(36)),
    PuzzleSet("letter_counting", _levels(8)),
    PuzzleSet("letter_jumble", _levels(2)),
    PuzzleSet("mahjong_puzzle", _levels(3)),
    PuzzleSet("manipulate_matrix", _levels(3)),
    PuzzleSet("maze"),
    PuzzleSet("mini_sudoku", _levels(5), reads=("solution",)),
    PuzzleSet("modulo_grid", (0, 2, 3, 4, 5)),
    PuzzleSet("needle_haystack", _levels(2)),
    PuzzleSet("number_filtering"),
    PuzzleSet("number_sequence", _levels(1)),
    PuzzleSet("palindrome_generation", reads=("letters",)),
    PuzzleSet("palindrome_partitioning", _levels(2), reads=("solution",)),
    PuzzleSet("path_star"),
    PuzzleSet("power_function", _levels(5)),
    PuzzleSet("prime_factorization"),
    PuzzleSet("products", _levels(11)),
    PuzzleSet("rearc", _levels(7), reads=("output",), tuples=True),
    PuzzleSet("rectangle_count", _levels(5)),
    PuzzleSet("rotate_matrix", _levels(3)),
    PuzzleSet("rotten_oranges", _levels(2)),
    PuzzleSet("self_reference", _levels(10)),
    PuzzleSet("sentence_reordering"),
    PuzzleSet("shortest_path", _levels(3), reads=("matrix",)),
    PuzzleSet("simple_equations"),
    PuzzleSet("simple_geometry"),
    PuzzleSet("spell_backward", _levels(4)),
    PuzzleSet("string_manipulation", _levels(5)),
    PuzzleSet("string_splitting"),
    PuzzleSet("string_synthesis"),
    PuzzleSet("sudoku", _levels(3), reads=("solution",)),
    PuzzleSet("syllogism", (1, 2, 3)),
    PuzzleSet("time_intervals", _levels(7), reads=("task_type",)),
    PuzzleSet("tsumego"),
    PuzzleSet("word_sequence_reversal"),
    PuzzleSet("word_sorting", _levels(5), reads=("sorted_words",)),
    PuzzleSet("zebra_puzzles", _levels(4)),
)
OPEN = {puzzle_set.name: puzzle_set for puzzle_set in _OPEN}

# Why the others are not used. What "earns" something was measured.
_RUNS = "its scorer runs the answer: "
_NO_REFERENCE = "its problems have no reference answer to hold its scorer to"
_HASHES = "the same seed makes other problems in another process: it walks through sets of strings"
BLOCKED = {
    "binary_matrix": _RUNS + "eval()",
    "bitwise_arithmetic": "its scorer runs a text of the problem's metadata: eval()",
    "boxnet": _NO_REFERENCE,
    "codeio": "its problems are made by running programs from a data file: exec()",
    "coin_flip": "the beginning of the right number earns 1, as 0 does for 0.125; 1e999999999 hangs its scorer",
    "complex_arithmetic": "nan earns 1 on every problem",
    "composite": "it is a mixture of other sets; name them instead",
    "countdown": _RUNS + "sympy's parse_expr()",
    "decimal_arithmetic": "a number that is off by one in its last place earns 1",
    "game_of_life": "nearly all boards of its higher levels end empty, and cells beyond the board are not looked at",
    "game_of_life_halting": "any text at all earns 1",
    "graph_color": _NO_REFERENCE,
    "gsm_symbolic": "its scorer reads the first number and drops its sign: -6 is right for 6, and 1,000 wrong for 1000",
    "intermediate_integration": _RUNS + "sympy's parse_expr()",
    "isomorphic_strings": _HASHES,
    "jugs": "some of its references say that there is no solution, and earn 0",
    "knight_swap": "no level of its curriculum makes a problem",
    "list_functions": "the same seed makes other problems: it draws from Python's global random numbers",
    "n_queens": _RUNS + "eval()",
    "number_format": "any candidate within 0.01 of the right one earns 1; at levels 2 and 3 those are all",
    "number_sorting": "a list of NaNs of the right length earns 1; its scorer runs its reference: eval()",
    "polynomial_equations": "its scorer picks numbers out of any text: a part of the question earned 1",
    "polynomial_multiplication": _RUNS + "sympy's parse_expr()",
    "pool_matrix": "averages that are wrong by 1 % earn 1, where two decimals are asked for",
    "propositional_logic": _NO_REFERENCE,
    "puzzle24": _RUNS + "sympy's parse_expr()",
    "quantum_lock": "its scorer picks the letters A, B and C out of any text: a line of the question earned 1",
    "ransom_note": _HASHES,
    "rubiks_cube": _NO_REFERENCE,
    "rush_hour": _NO_REFERENCE,
    "simple_integration": _RUNS + "sympy's parse_expr()",
    "sokoban": "one problem in six takes more than ten seconds to make",
    "spiral_matrix": _RUNS + "eval()",
    "string_insertion": _RUNS + "eval()",
    "survo": "a problem may have several right grids, of which all but one earn 0",
    "tower_of_hanoi": "a level has 6 to 20 different problems",
    "word_ladder": _HASHES,
}


def look_up(name: str) -> PuzzleSet:
    """The set of that name. Errors: PuzzlesRefused for one that is blocked or unknown."""
    if name in BLOCKED:
        raise PuzzlesRefused(f"the puzzle set {name} is blocked: {BLOCKED[name]}")
    if name not in OPEN:
        near = difflib.get_close_matches(name[:100], [*OPEN, *BLOCKED], n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the sets are {', '.join(OPEN)}"
        raise PuzzlesRefused(f"there is no puzzle set {name[:100]!r}{hint}")
    return OPEN[name]


def require_gym() -> None:
    """Errors: PuzzlesRefused where reasoning-gym is missing or of another version."""
    try:
        found = metadata.version("reasoning-gym")
    except metadata.PackageNotFoundError:
        raise PuzzlesRefused("puzzles need reasoning-gym: pip install 'reason[puzzles]'") from None
    if found != VERSION:
        raise PuzzlesRefused(
            f"puzzles need reasoning-gym {VERSION}, which they were checked with, not {found}: "
            "pip install 'reason[puzzles]'"
        )
