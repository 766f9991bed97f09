"""Loops and basic blocks of machine code."""

from __future__ import annotations

from benchmarks.instruments.machine_code.code import Instruction


def loops(code: list[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as sets of instructions: for a jump back to an instruction that dominates
    it, all that can reach the jump without passing there. Jumps in the text's order do not do:
    compilers place a part of a loop above its first instruction."""
    leaders, successors = blocks(code)
    predecessors: list[set[int]] = [set() for _ in leaders]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].add(block)
    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for header in following & dominators[block]:
            bodies.setdefault(header, {header}).update(_reaching(block, header, predecessors))
    ends = [*leaders[1:], len(code)]
    return [
        frozenset(i for block in blocks for i in range(leaders[block], ends[block]))
        for blocks in bodies.values()
    ]


def blocks(code: list[Instruction]) -> tuple[list[int], list[set[int]]]:
    """First instruction of each basic block, and the blocks that may follow it."""
    labels = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    starts = {0} | {labels[i.jumps_to] for i in code if i.jumps_to in labels}
    starts |= {
        i + 1
        for i, instruction in enumerate(code[:-1])
        if instruction.jumps_to or not instruction.falls_through
    }
    leaders = sorted(starts)
    block_of = {leader: block for block, leader in enumerate(leaders)}
    successors = []
    for end in [*leaders[1:], len(code)]:
        last = code[end - 1]
        following = {block_of[labels[last.jumps_to]]} if last.jumps_to in labels else set()
        if last.falls_through and end < len(code):
            following.add(block_of[end])
        successors.append(following)
    return leaders, successors


def _dominators(successors: list[set[int]], predecessors: list[set[int]]) -> list[set[int]]:
    """Per block those that every path from the first block to it passes, itself included; none for
    a block that cannot be reached."""
    reachable = _reachable(successors)
    dominators = [
        set(reachable) if block in reachable else set() for block in range(len(successors))
    ]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            new = {block} | set.intersection(
                *(dominators[p] for p in predecessors[block] & reachable)
            )
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _reachable(successors: list[set[int]]) -> set[int]:
    """Blocks that can be reached from the first one."""
    seen, pending = {0}, [0]
    while pending:
        for block in successors[pending.pop()] - seen:
            seen.add(block)
            pending.append(block)
    return seen


def _reaching(block: int, header: int, predecessors: list[set[int]]) -> set[int]:
    """`block` and all blocks that lead to it without passing `header`."""
    seen, pending = {block, header}, [block] if block != header else []
    while pending:
        for previous in predecessors[pending.pop()] - seen:
            seen.add(previous)
            pending.append(previous)
    return seen
