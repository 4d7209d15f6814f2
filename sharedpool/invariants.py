"""What must hold in every table between sections, as functions; stress and crash tests use them, too.

Each gives the sentences in which it is violated. They read a table that is at rest: no section may run meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .layout import (
    ARBITER_ROW,
    BARE,
    CELL_FREE,
    CELL_HIGH,
    CELL_KEY,
    CELL_ROW,
    CELL_ROW_SHIFT,
    CELL_STALLED,
    CELL_WAITING,
    CLOSING,
    DIRTY,
    FREE,
    FREE_CELL,
    FREE_SLOT,
    GATE,
    GRANT,
    GRANTED,
    HEAD,
    HEADER,
    HIGH,
    IDLE,
    IDLE_COUNT,
    KEY,
    LEASED,
    LINE,
    LINE_HIGH,
    MAX,
    MAX_PER_KEY,
    NEXT,
    NEXT_FREE,
    OPENED,
    OPENING,
    OVER,
    PAUSED,
    PREV,
    QUEUED,
    RESERVE,
    RESERVING,
    ROW,
    ROW_CLOSES,
    ROW_COUNTERS,
    ROW_FREE,
    STATE,
    STAYS,
    STOPPED,
    TAIL,
    TICKET,
    TURN_SHIFT,
    USED,
    WAITING_COUNT,
    describe,
    holder_of,
    is_high,
    tag_of,
    ticket_of,
)
from .stats import COUNTERS, REASONS
from .table import Table
from .view import count_keys

Violations = Iterator[str]


def slots(table: Table) -> list[tuple[int, int, int]]:
    """(index, place, word) of all slots ever used."""
    places = [(index, table.slot_at(index)) for index in range(table.words[HIGH])]
    return [(index, at, table.words[at]) for index, at in places]


def cells(table: Table) -> list[tuple[int, int]]:
    """(place, word) of all cells ever used."""
    return [(at, table.words[at]) for at in map(table.cell_at, range(table.words[CELL_HIGH]))]


def queue(table: Table) -> list[int]:
    """The waiting cells in order, by the links; ends at a cycle."""
    found: list[int] = []
    at = table.words[HEAD]
    while at and at not in found:
        found.append(at)
        at = table.words[at + NEXT]
    return found


def nobody_is_storing(table: Table) -> Violations:
    """DIRTY is 0."""
    if table.words[DIRTY]:
        yield f"DIRTY is {table.words[DIRTY]}"


def used_counts_what_is_not_free(table: Table) -> Violations:
    """USED counts the slots that are not FREE; every state is one."""
    count = sum(word & STATE != FREE for _, _, word in slots(table))
    if table.words[USED] != count:
        yield f"USED is {table.words[USED]}, {count} slots are not FREE"
    for index, at, word in slots(table):
        if word & STATE > CLOSING:
            yield f"slot {index} at {at}: no such state: {word:#x}"


def the_cap_holds_or_over_says_not(table: Table) -> Violations:
    """No more slots in use than MAX, or the OVER flag says so."""
    over = table.words[USED] > table.words[MAX]
    if over != bool(table.words[GATE] & OVER):
        yield f"USED {table.words[USED]}, MAX {table.words[MAX]}, OVER {table.words[GATE] & OVER}"


def with_a_reserve_idle_slots_are_counted(table: Table) -> Violations:
    """RESERVING says that there is a reserve or a limit per key; only then IDLE_COUNT counts.

    Only with a reserve high priority stands before normal.
    """
    w = table.words
    reserving = bool(w[GATE] & RESERVING)
    if reserving != bool(w[RESERVE] or w[MAX_PER_KEY]):
        yield f"RESERVE is {w[RESERVE]}, MAX_PER_KEY {w[MAX_PER_KEY]}, RESERVING {reserving}"
    count = sum(word & STATE == IDLE for _, _, word in slots(table)) if reserving else 0
    if w[IDLE_COUNT] != count:
        yield f"IDLE_COUNT is {w[IDLE_COUNT]} and not {count}"
    ranks = [not is_high(w[at]) for at in queue(table)]
    if w[RESERVE] and ranks != sorted(ranks):
        yield f"those of high priority do not stand before the others: {ranks}"


def marks_are_the_tags_of_idle_slots(table: Table) -> Violations:
    """A slot has its key's tag as its mark while it is IDLE, else 0."""
    for index, at, word in slots(table):
        tag = tag_of(table.words[at + KEY]) if word & STATE == IDLE else 0
        if table.marks[index] != tag:
            yield f"slot {index} ({describe(word)}): its mark is {table.marks[index]:#x} and not {tag:#x}"
    if any(table.marks[table.words[HIGH] : table.geometry.slots]):
        yield "a slot never used has a mark"


def free_slots_are_listed_once(table: Table) -> Violations:
    """The list of free slots has each of them once."""
    listed: list[int] = []
    at = table.words[FREE_SLOT]
    while at and at not in listed:
        listed.append(at)
        at = table.words[at + NEXT_FREE]
    free = {at for _, at, word in slots(table) if word & STATE == FREE}
    if at:
        yield f"the list of free slots has a cycle at {at}"
    if set(listed) != free:
        yield f"free slots are {sorted(free)}, listed are {listed}"
    beyond = range(table.words[HIGH], table.geometry.slots)
    if any(table.words[table.slot_at(index)] for index in beyond):
        yield "a slot beyond HIGH has a word"


def free_cells_are_listed_once(table: Table) -> Violations:
    """The list of free cells has each of them once."""
    listed: list[int] = []
    at = table.words[FREE_CELL]
    while at and at not in listed:
        listed.append(at)
        at = table.words[at + NEXT]
    free = {at for at, word in cells(table) if word & 15 == CELL_FREE}
    if at:
        yield f"the list of free cells has a cycle at {at}"
    if set(listed) != free:
        yield f"free cells are {sorted(free)}, listed are {listed}"
    beyond = range(table.words[CELL_HIGH], table.geometry.cells)
    if any(table.words[table.cell_at(index)] for index in beyond):
        yield "a cell beyond CELL_HIGH has a word"


def the_queue_is_who_waits_by_turn(table: Table) -> Violations:
    """The queue is the waiting cells without a grant in the order of their turns, linked both ways."""
    w = table.words
    waiting = [(word >> TURN_SHIFT, at) for at, word in cells(table) if word & 15 == CELL_WAITING and not w[at + GRANT]]
    linked = queue(table)
    if linked != [at for _, at in sorted(waiting)]:
        yield f"waiting by turn: {sorted(waiting)}, linked: {linked}"
    if linked and w[linked[-1] + NEXT]:
        yield "the queue has a cycle"
    if [w[at + PREV] for at in linked] != [0, *linked[:-1]][: len(linked)]:
        yield "the links backward are not those forward"
    if w[TAIL] != (linked[-1] if linked else 0):
        yield f"TAIL is {w[TAIL]}, the queue {linked}"
    if w[WAITING_COUNT] != len(linked):
        yield f"WAITING_COUNT is {w[WAITING_COUNT]}, the queue {linked}"
    if bool(w[GATE] & QUEUED) != bool(linked):
        yield f"QUEUED is {w[GATE] & QUEUED}, the queue {linked}"


def turns_are_given_once(table: Table) -> Violations:
    """No turn twice, and the next ticket is above all."""
    waiting = [word for _, word in cells(table) if word & 15 in (CELL_WAITING, CELL_STALLED)]
    if len({word >> TURN_SHIFT for word in waiting}) != len(waiting):
        yield f"a turn twice: {waiting}"
    tickets = [ticket_of(word) for word in waiting]
    if max(tickets, default=0) >= table.words[TICKET]:
        yield f"the next ticket is {table.words[TICKET]}, in use are {tickets}"


def grants_are_known_to_both(table: Table) -> Violations:
    """A granted slot and its cell name each other."""
    w = table.words
    for index, at, word in slots(table):
        if word & STATE == GRANTED:
            cell = table.cell_at(holder_of(word))
            if w[cell + GRANT] != at or w[cell] & 15 != CELL_WAITING:
                yield f"slot {index} is granted to cell {cell}, which has {w[cell]:#x} and the grant {w[cell + GRANT]}"
    for cell, word in cells(table):
        at = w[cell + GRANT]
        if at and (w[at] & STATE != GRANTED or table.cell_at(holder_of(w[at])) != cell):
            yield f"cell {cell} ({word:#x}) has the grant {at}, which is {describe(w[at])}"


def bare_grants_have_their_waiters_keys(table: Table) -> Violations:
    """A permit on its way to a waiter counts for the key that he wants."""
    w = table.words
    for index, at, word in slots(table):
        if word & STATE == GRANTED and word & BARE:
            wanted = w[table.cell_at(holder_of(word)) + CELL_KEY]
            if w[at + KEY] != wanted:
                yield f"slot {index} is granted for key {wanted:#x}, and has {w[at + KEY]:#x}"


def holders_are_rows_in_use(table: Table) -> Violations:
    """Slots and cells are held by rows that somebody has."""
    w = table.words

    def in_use(row: int) -> bool:
        return row == ARBITER_ROW or (row < table.geometry.rows and w[HEADER + ROW * row] & STATE != ROW_FREE)

    for index, _, word in slots(table):
        if word & STATE in (OPENING, LEASED, IDLE) and not in_use(holder_of(word)):
            yield f"slot {index} is held by a row that nobody has: {describe(word)}"
        if word & STATE == LEASED and word & BARE:
            yield f"slot {index} is leased and still says BARE"
    for cell, word in cells(table):
        if word & 15 != CELL_FREE and not in_use((word & CELL_ROW) >> CELL_ROW_SHIFT):
            yield f"cell {cell} belongs to a row that nobody has: {word:#x}"


ALL: tuple[Callable[[Table], Violations], ...] = (
    nobody_is_storing,
    used_counts_what_is_not_free,
    the_cap_holds_or_over_says_not,
    with_a_reserve_idle_slots_are_counted,
    marks_are_the_tags_of_idle_slots,
    free_slots_are_listed_once,
    free_cells_are_listed_once,
    the_queue_is_who_waits_by_turn,
    turns_are_given_once,
    grants_are_known_to_both,
    bare_grants_have_their_waiters_keys,
    holders_are_rows_in_use,
)


def violations(table: Table) -> list[str]:
    """Everything that is wrong with a table at rest."""
    return [f"{invariant.__name__}: {text}" for invariant in ALL for text in invariant(table)]


def check(table: Table) -> None:
    """Fail with everything that is wrong with a table at rest."""
    wrong = violations(table)
    if wrong:
        raise AssertionError("\n".join(wrong))


def leases_are_single(table: Table, leases: Iterable[tuple[int, int]]) -> Violations:
    """Leases as their holders know them, (place, word), against the table: each in force, none twice, none unknown."""
    known = sorted(leases)
    states = (LEASED, OPENING)
    there = sorted((at, word & ~0x10) for _, at, word in slots(table) if word & STATE in states)
    if known != there:
        yield f"leases known to holders: {known}, in the table: {there}"


def connections_add_up(table: Table) -> Violations:
    """Connections opened - connections closed for whatever reason = those leased, idle or granted now.

    Not among ALL: a process that is killed inside a section may take one count with it.
    """
    w = table.words
    offsets = range(ROW_CLOSES, ROW_CLOSES + len(REASONS))
    places = [HEADER + ROW * row for row in range(table.geometry.rows)]
    places += [table.geometry.line_base + LINE * line for line in range(w[LINE_HIGH])]
    opened = ROW_COUNTERS + COUNTERS.index("opened")
    began = sum(w[at + opened] for at in places)
    closed = sum(w[at + offset] for at in places for offset in offsets)
    alive = [at for _, at, word in slots(table) if word & STATE in (LEASED, IDLE, GRANTED) and not word & BARE]
    there = sum(w[at + OPENED] != 0 for at in alive)
    if began - closed != there:
        yield f"{began} connections were opened and {closed} closed; there are {there}"
    for at in alive:
        if w[at] & STATE == IDLE and not w[at + OPENED]:
            yield f"the idle slot {table.slot_index(at)} was never opened"


def keys_within_their_limit(table: Table) -> Violations:
    """No key has more slots than MAX_PER_KEY. Not among ALL: after it was lowered one may."""
    limit = table.words[MAX_PER_KEY]
    for key, count in count_keys(table.words, table.geometry).items():
        if limit and count > limit:
            yield f"key {key:#x} has {count} slots, MAX_PER_KEY is {limit}"


def _nobody_waits_in_vain_for_a_key(table: Table) -> Violations:
    w = table.words
    counts = count_keys(w, table.geometry)
    taken = w[USED] - w[IDLE_COUNT]
    for cell in queue(table):
        key = w[cell + CELL_KEY]
        if w[RESERVE] and not is_high(w[cell]) and taken >= w[MAX] - w[RESERVE]:
            continue
        room = counts.get(key, 0) < w[MAX_PER_KEY]
        if room and w[USED] < w[MAX]:
            yield f"cell {cell} waits beside a free permit: USED {w[USED]}, MAX {w[MAX]}, its key has {counts.get(key)}"
        for index, at, word in slots(table):
            if word & STATE == IDLE and not word & STAYS and (room or w[at + KEY] == key):
                yield f"cell {cell} waits beside an idle connection: slot {index}"


def nobody_waits_in_vain(table: Table) -> Violations:
    """At rest, with everything closed to its end: nobody waits beside what could be had."""
    w = table.words
    head = w[HEAD]
    if not head or w[GATE] & (PAUSED | STOPPED):
        return
    if w[MAX_PER_KEY]:
        yield from _nobody_waits_in_vain_for_a_key(table)
        return
    if w[RESERVE] and not is_high(w[head]) and w[USED] - w[IDLE_COUNT] >= w[MAX] - w[RESERVE]:
        return
    if w[USED] < w[MAX]:
        yield f"cell {head} waits beside a free permit: USED {w[USED]}, MAX {w[MAX]}"
    for index, at, word in slots(table):
        if word & STATE == IDLE and not word & STAYS:
            same = "its own" if w[at + KEY] == w[head + CELL_KEY] else "another"
            yield f"cell {head} waits beside an idle connection of {same} key: slot {index}"
