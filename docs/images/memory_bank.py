"""Draws docs/images/memory-bank.svg: the frames that a frame of SAM 2 attends to.

python docs/images/memory_bank.py
"""

from __future__ import annotations

from pathlib import Path

from maskwright.systems.kinds.video import MemoryBank

FRAMES, STEP, LEFT, ROW = 26, 26, 190, 52
CASES = (
    ("prompt on frame 0", [0], {}, 24),
    ("prompts on frames 0, 12, 25", [0, 12, 25], {}, 21),
    ("memory.stride=3", [0], {"stride": 3}, 24),
)
INK, MEMORY, PROMPT, POINTER = "#333", "#1b9e77", "#d95f02", "#7570b3"


def main() -> None:
    width, height = LEFT + FRAMES * STEP + 20, ROW * len(CASES) + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for number in range(0, FRAMES, 5):
        parts.append(f'<text x="{LEFT + number * STEP + 10}" y="18" text-anchor="middle">{number}</text>')
    for row, (title, prompted, options, index) in enumerate(CASES):
        top = 28 + row * ROW
        found = MemoryBank(**options).select(
            index, prompted, [f for f in range(index) if f not in prompted], length=None, reverse=False
        )
        memories, pointers = dict(found.memories), dict(found.pointers)
        parts.append(f'<text x="8" y="{top + 15}">{title}</text>')
        for frame in range(FRAMES):
            x = LEFT + frame * STEP
            fill = PROMPT if frame in prompted else MEMORY if frame in memories else "white"
            parts.append(f'<rect x="{x}" y="{top}" width="20" height="20" rx="3" fill="{fill}" stroke="{INK}"/>')
            if frame in pointers:
                parts.append(f'<circle cx="{x + 10}" cy="{top + 29}" r="4" fill="{POINTER}"/>')
            if frame == index:
                parts.append(f'<rect x="{x - 3}" y="{top - 3}" width="26" height="26" fill="none" stroke="{INK}" '
                             'stroke-width="3"/>')  # fmt: skip
    keys = (("prompted", PROMPT), ("memory", MEMORY), ("object pointer", POINTER))
    for number, (text, fill) in enumerate(keys):
        x, y = LEFT + number * 150, height - 24
        parts.append(
            f'<rect x="{x}" y="{y}" width="14" height="14" fill="{fill}"/><text x="{x + 20}" y="{y + 12}">{text}</text>'
        )
    parts.append(f'<text x="8" y="{height - 12}">current frame: thick border</text></svg>')
    Path(__file__).with_name("memory-bank.svg").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
