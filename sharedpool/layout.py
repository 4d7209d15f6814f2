"""Where everything lies in a pool's shared memory, and what the bits of its words mean. Data and arithmetic only.

The memory is one array of 64-bit words, followed by two arrays of 32-bit marks:

    header | rows | slots | cells | lines (64-bit words)
    marks of the slots | kicks of the cells (32-bit)

*Committed* words are the slot words, the cell words, the row words, the line words, MAX, RESERVE, MAX_PER_KEY, and in
GATE the epoch, PAUSED and STOPPED. Everything else is *derived*: it can be rebuilt from them, and `table.repair` does
that.

A slot word, from the top: lease serial 12 | generation 28 | holder 16 | flags 4 | state 4. The holder of a GRANTED slot
is a cell, else a row. (slot, generation) names a connection for ever; (slot, generation, serial) names a lease.
"""

from __future__ import annotations

import dataclasses
from typing import Final

#: 3 is 2 and MAX_PER_KEY, KEYED, KEYS_OVER, and lines; what was there before lies where it lay.
LAYOUT: Final = 3
#: The layouts that this version serves, the oldest first. In an older one what came later is off.
SERVED: Final = (2, 3)
#: From this layout on there is a limit per key.
WITH_KEYS: Final = 3
MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF
MASK32: Final = 0xFFFF_FFFF
#: What MAX_WAITING says where there is no limit.
ANY_NUMBER: Final = 0xFFFF_FFFF

# --- header words -----------------------------------------------------------------------------------------------------
DIRTY: Final = 0  # the row that is storing; 0 between sections
GATE: Final = 1  # epoch of limits and flags, and whether anything keeps a checkout from going straight ahead
VER: Final = 2  # bumped whenever somebody who decided to wait might now decide otherwise
USED: Final = 3  # slots that are not FREE
MAX: Final = 4  # the cap
HEAD: Final = 5  # first waiting cell; 0: nobody waits
TAIL: Final = 6
WAITING_COUNT: Final = 7
TICKET: Final = 8  # the next ticket
FREE_SLOT: Final = 9  # head of the list of free slots below HIGH
HIGH: Final = 10  # slots ever used: searches end there
FREE_CELL: Final = 11  # head of the list of free cells below CELL_HIGH
CELL_HIGH: Final = 12
HAND: Final = 13  # where the search for the least recently used begins
BEAT: Final = 14  # the arbiter's last turn, monotonic ns
WATCH: Final = 15  # 1: the arbiter sleeps long and wants to be told when somebody queues
IDLE_TIMEOUT: Final = 16  # ns; 0: none
CLOSE_TIMEOUT: Final = 17  # ns
STEAL_AFTER: Final = 18  # ns; 0: from the measured connect time
CONNECT_TIME: Final = 19  # ns, smoothed
RULES: Final = 20  # CAN_MOVE, STICKY, STRICT
INCARNATION: Final = 21
MAX_IDLE: Final = 22  # MASK64: no limit
MAX_LIFETIME: Final = 23  # ns; 0: none
LEASE_TIMEOUT: Final = 24  # ns; 0: none
MAX_WAITING: Final = 27  # nobody queues while so many wait; never 0
RESERVE: Final = 28  # slots for checkouts with high priority only
IDLE_COUNT: Final = 29  # idle slots, while GATE says RESERVING; else 0 (derived)
FOLD: Final = 30  # how many counters of ended rows were folded << 32 | the place of the one being folded; see counting
FOLD_TOTAL: Final = 31  # what its total becomes
MIN_IDLE: Final = 32  # connections of a named key that are to exist
CHECK_AFTER: Final = 33  # ns; idle longer than this, a driver's active check is asked
MAX_PER_KEY: Final = 34  # slots that one key may have; 0: no limit
KEYED: Final = 35  # bumped under such a limit when a slot gets a key, and when somebody joins the queue or is served
FOLD_TO: Final = 36  # where that total lies, if it is a line's or a line is folded; else 0
LINE_HIGH: Final = 37  # lines ever used: searches end there
KEYS_OVER: Final = 40  # 1: keys may have more slots than MAX_PER_KEY since it was lowered; the arbiter's
NOTED_PER_KEY: Final = 41  # a limit per key that comes into force once the table has the layout for it; 0: none
MAX_FOREIGN: Final = 42  # 1 + connections of others that a process keeps at hand; ANY_NUMBER: no limit; 0: not said
DECLARED_MAX: Final = 43  # the cap as it was declared last; an operator may have set another since
DECLARED_IDLE: Final = 44  # the same of idle_timeout, ns; 0: none
HEADER: Final = 64

# --- GATE: epoch << 5 | flags. Zero flags: a checkout may take what it finds ------------------------------------------
QUEUED: Final = 1  # somebody waits (derived)
OVER: Final = 2  # more slots in use than MAX allows (derived)
PAUSED: Final = 4
STOPPED: Final = 8
RESERVING: Final = 16  # RESERVE or MAX_PER_KEY is not 0 (derived): idle slots are counted, takers verify who is served
GATE_FLAGS: Final = 31
EPOCH: Final = 32

# --- RULES ------------------------------------------------------------------------------------------------------------
CAN_MOVE: Final = 1
STICKY: Final = 2  # sticky order also for what can move
RECLAIM: Final = 1 << 8  # an abandoned lease is taken away
STRICT: Final = 4  # first come, first served also for what cannot move
UNPOLLED: Final = 8  # check="none"
ACTIVE: Final = 16  # check="active"

# --- rows: word | nonce | since | scrap | counters | closes by reason | histograms ------------------------------------
ROW: Final = 112
ROW_NONCE: Final = 1
ROW_SINCE: Final = 2
ROW_SCRAP: Final = 3  # for sections that count where nothing is to be counted
ROW_COUNTERS: Final = 4
ROW_ARBITERS: Final = 20  # what only the arbiter counts
ROW_CLOSES: Final = 36  # by reason, in the order of stats.REASONS
ROW_EVICTED: Final = 36  # the first of them, counted by `enqueue` itself
ROW_WAIT_SECONDS: Final = 64  # histograms: 15 buckets, and the sum in ns
ROW_CONNECT_SECONDS: Final = 80
ROW_LEASE_SECONDS: Final = 96
#: Durations no longer than this, ns, are in a histogram's first bucket.
SHORT: Final = 500_000
TOTALS_ROW: Final = 0  # what dead rows had counted
ARBITER_ROW: Final = 1
FIRST_ROW: Final = 2
ROW_FREE: Final = 0
ROW_LIVE: Final = 1
ROW_DEAD: Final = 2

# --- lines: word | key | counters | closes by reason, at the offsets that they have in a row --------------------------
# What one row has counted of one key, and so not in itself: a row has what there was no line for. Lines of TOTALS_ROW
# are the arbiter's: what the dead had counted, and what it counts itself.
LINE: Final = 64
LINE_KEY: Final = 1
LINE_ROW_SHIFT: Final = 4
LINE_USED: Final = 1

# --- slots: word | key | since | opened | state version | next free | cause -------------------------------------------
SLOT: Final = 8
SLOT_SHIFT: Final = 3
KEY: Final = 1
SINCE: Final = 2  # when the state began, monotonic ns
OPENED: Final = 3  # when its connection was opened, monotonic ns; 0: it has none, or not yet
VERSION: Final = 4  # of the session state that an export would carry
NEXT_FREE: Final = 5
CAUSE: Final = 6  # the counter in which its last close was counted: the reason

FREE: Final = 0
OPENING: Final = 1
IDLE: Final = 2
LEASED: Final = 3
GRANTED: Final = 4
CLOSING: Final = 5
STATE: Final = 15
STATE_NAMES: Final = ("free", "opening", "idle", "leased", "granted", "closing")

DOOMED: Final = 0x10  # to be closed at the next chance
BARE: Final = 0x20  # granted without a connection: the taker opens its own
STAYS: Final = 0x40  # cannot move to another process
HOLDER_SHIFT: Final = 8
HOLDER: Final = 0xFFFF << HOLDER_SHIFT
GEN_SHIFT: Final = 24
GEN: Final = 0xFFF_FFFF << GEN_SHIFT
GEN_MASK: Final = 0xFFF_FFFF
GEN_ONE: Final = 1 << GEN_SHIFT
SERIAL_SHIFT: Final = 52
SERIAL_ONE: Final = 1 << SERIAL_SHIFT
SERIAL: Final = 0xFFF << 52
IDENTITY: Final = SERIAL | GEN | HOLDER

# --- cells: word | key | next | previous | granted slot | deadline | since | passed -----------------------------------
# A cell's word, from the top: turn 44 (ordinary 1 | ticket 40 | part 3) | row 16 | state 4. Turns are the order of the
# queue: the lower one is served first, and no two are equal. Who asks with normal priority takes the next ticket and
# PART. With high priority one takes a turn just before the first of normal priority, of his ticket and a lower part;
# of those there are MOST_PASSED, so nobody is passed more often. If all have been passed, the next ticket. While there
# is a reserve, whoever has high priority takes the next ticket without ORDINARY: before all others.
CELL: Final = 8
CELL_SHIFT: Final = 3
CELL_KEY: Final = 1
NEXT: Final = 2
PREV: Final = 3
GRANT: Final = 4  # the slot granted to this cell (derived)
CELL_DEADLINE: Final = 5
CELL_SINCE: Final = 6
PASSED: Final = 7  # how many with high priority took a turn before this one's

CELL_FREE: Final = 0
CELL_OWNED: Final = 1  # belongs to a process, nobody waits in it
CELL_WAITING: Final = 2
CELL_STALLED: Final = 3  # did not take its grant: passed over until its owner stirs; keeps its ticket
CELL_ROW_SHIFT: Final = 4
CELL_ROW: Final = 0xFFFF << CELL_ROW_SHIFT
TURN_SHIFT: Final = 20
NUMBER_SHIFT: Final = 23
NUMBER_MASK: Final = 0xFF_FFFF_FFFF
PART: Final = 7 << TURN_SHIFT  # all of it: normal priority
ORDINARY: Final = 1 << 63
MOST_PASSED: Final = 7
#: From here on a repair numbers those who wait anew, long before tickets outgrow their bits.
MANY_TICKETS: Final = 1 << 39


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """How many rows, slots, cells and lines a segment has; fixed for its life."""

    rows: int
    slots: int
    cells: int
    lines: int = 0

    @property
    def slot_base(self) -> int:
        return HEADER + ROW * self.rows

    @property
    def cell_base(self) -> int:
        return self.slot_base + SLOT * self.slots

    @property
    def line_base(self) -> int:
        return self.cell_base + CELL * self.cells

    @property
    def words(self) -> int:
        return self.line_base + LINE * self.lines

    @property
    def marks(self) -> int:
        return self.slots + self.cells

    @property
    def size(self) -> int:
        """Bytes of words and marks together."""
        return 8 * self.words + 4 * ((self.marks + 1) // 2 * 2)


def tag_of(key: int) -> int:
    """A key's 32-bit mark; never 0."""
    return (key & 0xFFFF_FFFF) or 1


def generation_of(word: int) -> int:
    """The generation in a slot word."""
    return (word & GEN) >> GEN_SHIFT


def holder_of(word: int) -> int:
    """The holder in a slot word: a cell's number if it is GRANTED, else a row."""
    return (word & HOLDER) >> HOLDER_SHIFT


def leased_word(idle: int, row: int) -> int:
    """An idle slot's word after it is leased to a row."""
    return (((idle & ~(HOLDER | STATE)) + SERIAL_ONE) & MASK64) | row << HOLDER_SHIFT | LEASED


def opening_word(word: int, row: int, state: int = OPENING) -> int:
    """A slot's word after a new connection was begun in it: next generation, next serial, no flags."""
    generation = (generation_of(word) + 1) & GEN_MASK
    return (((word & SERIAL) + SERIAL_ONE) & MASK64) | generation << GEN_SHIFT | row << HOLDER_SHIFT | state


def granted_word(word: int, cell: int) -> int:
    """A slot's word once granted to a cell: what flags it had, but not DOOMED, are kept only with a connection."""
    return word & ~(STATE | HOLDER | 0xF0) | (word & STAYS) | cell << HOLDER_SHIFT | GRANTED


def ticket_of(word: int) -> int:
    """The ticket in a waiting cell's word; those with high priority may share one with whom they passed."""
    return word >> NUMBER_SHIFT & NUMBER_MASK


def is_high(word: int) -> bool:
    """Whether who waits in a cell does so with high priority; its word."""
    return word & PART != PART


def with_state(word: int, state: int) -> int:
    """The same word in another state; of a slot or a cell."""
    return word & ~STATE | state


def describe(word: int) -> str:
    """A slot word for people: `slot leased by row 3, generation 7, serial 12, doomed`."""
    state = word & STATE
    name = STATE_NAMES[state] if state < len(STATE_NAMES) else f"state {state}?"
    holder = "cell" if state == GRANTED else "row"
    flags = "".join(f", {text}" for bit, text in ((DOOMED, "doomed"), (BARE, "bare"), (STAYS, "stays")) if word & bit)
    return f"{name} by {holder} {holder_of(word)}, generation {generation_of(word)}, serial {word >> 52}{flags}"
