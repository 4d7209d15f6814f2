"""All orders in which workers and the arbiter can take their steps: every state of a small pool is visited once.

A step is one reading of shared words or one section; who is killed may be killed between two of them and, where that is
asked for, at every store of a section. An arbiter that was killed has an heir, who knows nothing but the table. After
each step the memory and the actors' places are a state; states seen before are not gone through again. What is looked
for: an invariant that does not hold, a checkout that overtakes a waiter, a grant to other than the longest waiter, more
slots than the cap, a lease taken away from the living, and an end at which somebody waits in vain.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

from sharedpool import invariants
from sharedpool.layout import (
    ARBITER_ROW,
    BARE,
    CELL_STALLED,
    CLOSING,
    DIRTY,
    DOOMED,
    FIRST_ROW,
    GATE,
    GRANT,
    GRANTED,
    HEAD,
    IDLE,
    IDLE_COUNT,
    KEY,
    KEYED,
    LEASED,
    MAX,
    MAX_PER_KEY,
    MAX_WAITING,
    OPENING,
    PART,
    PAUSED,
    RESERVE,
    ROW_DEAD,
    STATE,
    STAYS,
    STOPPED,
    USED,
    VER,
    WAITING_COUNT,
    is_high,
    with_state,
)
from sharedpool.table import DONE, FULL, Table

from . import moves
from .moves import AGAIN, STOP, Plan
from .tables import A, Breaker, BreakingLease, Broken, World, breaking

NOW = 7  # time stands still: what is verified by it is verified by the slot's word, too

#: An actor's place in its program, with what it has read so far.
Place = tuple[Any, ...]
START: Place = ("start",)
OVER: Place = ("over",)
DEAD: Place = ("dead",)
REST: Place = ("rest",)
HEIR: Place = ("heir",)


@dataclasses.dataclass(frozen=True)
class Worker:
    """A thread of a process of its own: one checkout, one checkin.

    Attributes:
        key: What it wants.
        connects: False for a bare permit.
        fails: Its connect may fail.
        gives_up: It may leave the queue at any time.
        discards: It closes what it had.
        high: It asks with high priority.
        keeps: It never gives back what it got.
    """

    key: int = A
    connects: bool = True
    fails: bool = False
    gives_up: bool = False
    discards: bool = False
    keeps: bool = False
    high: bool = False


@dataclasses.dataclass(frozen=True)
class State:
    memory: bytes
    places: tuple[Place, ...]  # the workers', then the arbiter's
    script: int
    deaths: int  # so often the arbiter may still be killed


class Violation(AssertionError):
    """Something that must not happen, with the shortest way to it."""


class Explorer:
    """Goes through all states.

    Args:
        workers: Who checks out.
        script: What the arbiter does, in this order, at any time.
        maximum: The cap.
        idle: Keys of connections that are idle at the start, left by another process.
        watch: The arbiter looks after whoever waits beside what it could have.
        flags: PAUSED at the start.
        reserve: Slots for high priority only.
        per_key: The limit per key; 0: none.
        stays: What is idle at the start cannot move.
        max_waiting: Who would have to queue while so many wait is refused.
        deaths: So often the arbiter is killed, at any time.
        breaks: Whoever is killed may be killed at every store of a section, too.
        unsaid: Transitions that do not bump VER: what the version rule is for.
        forgets: What the arbiter should do and does not.
        unkeyed: Transitions that do not bump KEYED.
    """

    def __init__(
        self,
        workers: list[Worker],
        script: tuple[str, ...] = (),
        *,
        maximum: int = 1,
        idle: tuple[int, ...] = (),
        watch: bool = False,
        flags: int = 0,
        reserve: int = 0,
        per_key: int = 0,
        stays: bool = False,
        max_waiting: int = 0,
        deaths: int = 0,
        breaks: bool = False,
        unsaid: frozenset[str] = frozenset(),
        forgets: frozenset[str] = frozenset(),
        unkeyed: frozenset[str] = frozenset(),
    ) -> None:
        self.workers = workers
        self.script = script
        self.watch = watch
        self.deaths = deaths
        self.breaks = breaks
        self.unsaid = unsaid
        self.unkeyed = unkeyed
        self.forgets = forgets
        slots = maximum + script.count("raise")
        self.world = World(maximum=maximum, slots=slots, cells=len(workers), workers=len(workers) + 1, lines=0)
        for at in [self.world.leased(FIRST_ROW + len(workers), key, STAYS if stays else 0) for key in idle]:
            self.world.give_back(at)
        self.cells = [self.world.cell(FIRST_ROW + index) for index in range(len(workers))]
        if max_waiting:
            self.world.words[MAX_WAITING] = max_waiting
        if flags or reserve or per_key:
            self.world.limit(maximum, flags, reserve, per_key)
        self.disorder = "revoke" in script or any(worker.high for worker in workers)
        self.states = 0
        self._sound: set[bytes] = set()

    # --- the search ---------------------------------------------------------------------------------------------------

    def explore(self) -> int:
        """Visit every state; gives how many there are.

        Raises:
            Violation: With the shortest sequence of steps that leads there.
        """
        first = State(self.world.save(), (START,) * len(self.workers) + (REST,), 0, self.deaths)
        came: dict[State, tuple[State, str] | None] = {first: None}
        todo = deque([first])
        while todo:
            state = todo.popleft()
            self.states += 1
            try:
                following = list(self._following(state))
                if not following:
                    self._at_the_end(state)
                for label, after in following:
                    if after not in came:
                        came[after] = (state, label)
                        todo.append(after)
            except AssertionError as error:
                raise Violation("\n".join([*self._way(came, state), f"  -> {error}"])) from error
        return self.states

    def _way(self, came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
        labels: list[str] = []
        before = came[state]
        while before is not None:
            labels.append(before[1])
            before = came[before[0]]
        return labels[::-1]

    def _following(self, state: State) -> Iterator[tuple[str, State]]:
        """Every step that somebody can take here: its description, and the state after it."""
        for index, place in enumerate(state.places[:-1]):
            self.world.restore(state.memory)
            for number in range(self._choices(index, place)):
                self.world.restore(state.memory)
                label, after = self._step(index, place, number)
                places = (*state.places[:index], after, *state.places[index + 1 :])
                yield f"worker {index} {label}", self._after(state, places, state.script)
        yield from self._arbiter(state)

    def _save(self, before: bytes) -> bytes:
        memory = self.world.save()
        if memory == before:
            return before
        if memory not in self._sound:
            self._sound.add(memory)
            if not self.world.words[DIRTY]:  # else a section was left half done, and is repaired by who comes next
                invariants.check(self.world.table(ARBITER_ROW))
        return memory

    def _after(self, state: State, places: tuple[Place, ...], script: int, died: bool = False) -> State:
        return State(self._save(state.memory), places, script, state.deaths - died)

    def _at_the_end(self, state: State) -> None:
        self.world.restore(state.memory)
        table = self.world.table(ARBITER_ROW)
        wrong = [*invariants.nobody_is_storing(table), *invariants.nobody_waits_in_vain(table)]
        assert not wrong, wrong
        keepers = any(worker.keeps for worker in self.workers)
        if keepers or table.words[GATE] & PAUSED:
            return
        for index, place in enumerate(state.places[:-1]):
            assert place in (OVER, DEAD), f"worker {index} is stuck: {place}"
        for index, _, word in invariants.slots(table):
            assert word & STATE in (0, IDLE), f"slot {index} is left {word:#x}"

    # --- commits ------------------------------------------------------------------------------------------------------

    def _commit(self, table: Table, plan: Plan) -> tuple[bool, int]:
        w = table.words
        queue, used, limit, ver = invariants.queue(table), w[USED], w[MAX], w[VER]
        keyed = w[KEYED]
        closing = sum(word & STATE == CLOSING for _, _, word in invariants.slots(table))
        keys, entitled = self.world.keys(), self._entitled(table, plan)
        answer, word = moves.carry_out(table, plan)
        if answer == FULL:
            assert len(queue) == w[WAITING_COUNT] == w[MAX_WAITING]
            assert not list(invariants.nobody_waits_in_vain(table)), "refused where it need not have queued"
            return True, FULL
        if answer != DONE:
            return False, 0
        if plan.method == "close" and plan.arguments[6]:
            assert used - closing > limit, f"closed above the limit: {used} in use, {closing} closing, MAX {limit}"
        if plan.method in self.unsaid:
            w[VER] = ver
        if plan.method in self.unkeyed:
            w[KEYED] = keyed
        if w[RESERVE]:
            self._commit_with_reserve(table, plan)
        if w[MAX_PER_KEY] and plan.method != "set_limit":
            self._commit_with_keys(plan, keys, entitled)
            queue = entitled if plan.method != "enqueue_high" else queue
            if plan.method == "hand" and plan.arguments[1] & STATE == IDLE and plan.arguments[4] in queue:
                # Those before it need not have what is idle, if as many permits are on their way to them.
                passed = queue.index(plan.arguments[4])
                assert passed <= closing, f"an idle one to {plan.arguments[4]}, first is {queue[0]}"
                queue = queue[passed:]
        if plan.method in ("take_idle", "take_free", "take_idle_counted"):
            before = [cell for cell in queue if not self._passes(table, cell)]
            assert not before, f"{plan.method} overtakes {before}"
        elif plan.method == "enqueue_high":
            after = invariants.queue(table)
            assert [cell for cell in after if cell != plan.at] == queue
            ranks = [w[cell] & PART == PART for cell in after]
            assert ranks == sorted(ranks), f"high ones behind normal ones: {ranks}"
            assert not any(w[cell] & PART != PART for cell in after[after.index(plan.at) + 1 :]), "before its like"
        elif plan.method in ("hand", "hand_free") and not self.disorder:
            # One that stalled, or asks with high priority, may come to the head between a search and its commit.
            assert plan.arguments[4] == queue[0], f"{plan.method} to {plan.arguments[4]}, first is {queue[0]}"
        assert w[USED] <= max(limit, used), f"USED {w[USED]} above MAX {limit}"
        return True, word

    def _entitled(self, table: Table, plan: Plan) -> list[int]:
        """With a limit per key: who waits and may have the slot that a plan is about."""
        w = table.words
        if not w[MAX_PER_KEY] or not plan.method or plan.method in ("set_limit", "set_row"):
            return []
        if plan.method == "take_free":
            return self.world.entitled(plan.arguments[4])
        bare = plan.method in ("free", "hand") and (plan.method == "free" or bool(plan.arguments[2] & BARE))
        return self.world.entitled(without=w[plan.at + KEY]) if bare else self.world.entitled(w[plan.at + KEY])

    def _commit_with_keys(self, plan: Plan, before: collections.Counter[int], entitled: list[int]) -> None:
        """No key got more than it may, and nothing was left idle or free that a waiter might have had."""
        w = self.world.words
        for key, count in self.world.keys().items():
            assert count <= max(w[MAX_PER_KEY], before[key]), f"{plan.method}: key {key:#x} has {count} slots"
        if plan.method in ("put_idle_counted", "free") and not w[GATE] & moves.CLOSED and not w[RESERVE]:
            assert not entitled, f"{plan.method} although {entitled} may have it"

    def _passes(self, table: Table, cell: int) -> bool:
        """Whether this worker need not wait for who waits in a cell."""
        return bool(table.words[RESERVE]) and self._is_high(table.row) and not is_high(table.words[cell])

    def _is_high(self, row: int) -> bool:
        return row != ARBITER_ROW and self.workers[row - FIRST_ROW].high

    def _commit_with_reserve(self, table: Table, plan: Plan) -> None:
        """Nothing was given to normal priority that is for high."""
        w = table.words
        in_use, most = w[USED] - w[IDLE_COUNT], w[MAX] - w[RESERVE]
        if plan.method in ("take_idle", "take_free", "take_idle_counted"):
            assert self._is_high(table.row) or in_use <= most, f"{in_use} in use, {most} for normal priority"
        elif plan.method in ("hand", "hand_free"):
            old_cell = plan.arguments[6] if plan.method == "hand" else 0
            normal = not is_high(plan.arguments[5]) and not (old_cell and not is_high(w[old_cell]))
            assert not normal or in_use <= most, f"{in_use} in use, {most} for normal priority"

    # --- workers ------------------------------------------------------------------------------------------------------

    def _choices(self, index: int, place: Place) -> int:
        """How many different steps a worker can take."""
        worker, w = self.workers[index], self.world.words
        if place[0] in ("over", "dead") or (place[0] == "has" and worker.keeps):
            return 0
        if place[0] == "waits":
            cell = self.cells[index]
            if w[cell + GRANT] or w[cell] & 15 == CELL_STALLED:
                return 1
            return int(worker.gives_up or bool(w[GATE] & STOPPED))
        if place[0] == "opens":
            return 1 + worker.fails
        return 1

    def _step(self, index: int, place: Place, number: int) -> tuple[str, Place]:
        table = self.world.table(FIRST_ROW + index)
        return getattr(self, "_" + place[0])(index, table, *place[1:], number)  # type: ignore[no-any-return]

    def _start(self, index: int, table: Table, _: int) -> tuple[str, Place]:
        return "reads GATE and VER", ("looked", table.words[GATE], table.words[VER])

    def _looked(self, index: int, table: Table, gate: int, ver: int, _: int) -> tuple[str, Place]:
        worker = self.workers[index]
        plan = moves.checkout(table, worker.key, worker.connects, gate, ver, self.cells[index], NOW, worker.high)
        if plan is STOP:
            return "finds the pool stopped", OVER
        return f"decides {plan}", START if plan is AGAIN else ("decided", plan)

    def _decided(self, index: int, table: Table, plan: Plan, _: int) -> tuple[str, Place]:
        done, word = self._commit(table, plan)
        if not done:
            return f"cannot {plan.method}", START
        if word == FULL:
            return "is refused", OVER
        return plan.method, ("waits",) if plan.method.startswith("enqueue") else self._holds(plan.at, word)

    def _holds(self, at: int, word: int) -> Place:
        return ("opens" if word & STATE == OPENING else "has", at, word)

    def _waits(self, index: int, table: Table, _: int) -> tuple[str, Place]:
        w, cell, worker = table.words, self.cells[index], self.workers[index]
        if w[cell + GRANT]:
            plan = moves.take(table, cell, worker.key, worker.connects, NOW)
            return "sees its grant", ("waits",) if plan is AGAIN else ("taking", plan)
        if w[GATE] & STOPPED or (worker.gives_up and w[cell] & 15 != CELL_STALLED):
            return "wants to leave", ("leaving", moves.leave(table, cell, w[cell]))
        return "stirs", ("stirred", w[cell], w[GATE], w[VER])

    def _taking(self, index: int, table: Table, plan: Plan, _: int) -> tuple[str, Place]:
        done, word = self._commit(table, plan)
        return f"takes its grant: {done}", self._holds(plan.at, word) if done else ("waits",)

    def _leaving(self, index: int, table: Table, plan: Plan, _: int) -> tuple[str, Place]:
        done, _ = self._commit(table, plan)
        return f"leaves: {done}", OVER if done else ("waits",)

    def _stirred(self, index: int, table: Table, word: int, gate: int, ver: int, _: int) -> tuple[str, Place]:
        plan = moves.rejoin(table, self.cells[index], word, gate, ver)
        return f"finds its place {plan}", ("rejoining", plan)

    def _rejoining(self, index: int, table: Table, plan: Plan, _: int) -> tuple[str, Place]:
        done, _ = self._commit(table, plan)
        return f"rejoins: {done}", ("waits",)

    def _opens(self, index: int, table: Table, at: int, word: int, number: int) -> tuple[str, Place]:
        if number:
            return "cannot connect", ("fails", at, word)
        return "has connected", ("connecting", moves.connected(table, at, word, NOW), at, word)

    def _connecting(self, index: int, table: Table, plan: Plan, at: int, word: int, _: int) -> tuple[str, Place]:
        done, new = self._commit(table, plan)
        return f"is connected: {done}", ("has", at, new & ~DOOMED) if done else ("opens", at, word)

    def _fails(self, index: int, table: Table, at: int, word: int, _: int) -> tuple[str, Place]:
        return "reads what to do with its permit", ("failed", at, word, self._seen(table, at, word), table.words[GATE])

    def _failed(self, index: int, table: Table, at: int, word: int, seen: int, gate: int, _: int) -> tuple[str, Place]:
        plan = moves.pass_on(table, at, seen, gate, 0, NOW)
        back: Place = ("fails", at, word)
        return f"decides {plan}", back if plan is AGAIN else ("giving", plan, back)

    def _has(self, index: int, table: Table, at: int, word: int, _: int) -> tuple[str, Place]:
        return "reads what to do at its checkin", ("ends", at, word, self._seen(table, at, word), table.words[GATE])

    def _ends(self, index: int, table: Table, at: int, word: int, seen: int, gate: int, _: int) -> tuple[str, Place]:
        worker = self.workers[index]
        if worker.discards:
            plan = moves.close(table, at, seen, 0, NOW)
        elif worker.connects:
            plan = moves.checkin(table, at, seen, gate, worker.key, NOW)
        else:
            plan = moves.pass_on(table, at, seen, gate, 0, NOW)
        back: Place = ("has", at, word)
        return f"decides {plan}", back if plan is AGAIN else ("giving", plan, back)

    def _giving(self, index: int, table: Table, plan: Plan, back: Place, _: int) -> tuple[str, Place]:
        done, _ = self._commit(table, plan)
        return f"{plan.method}: {done}", OVER if done else back

    def _seen(self, table: Table, at: int, word: int) -> int:
        seen = table.words[at]
        assert not (seen ^ word) & ~DOOMED, f"a lease was taken away from the living: {word:#x}, {seen:#x}"
        return int(seen)

    # --- the arbiter: one thread, so what it has begun is finished before the next ------------------------------------

    def _arbiter(self, state: State) -> Iterator[tuple[str, State]]:
        self.world.restore(state.memory)
        table, place = self.world.table(ARBITER_ROW), state.places[-1]
        if place[0] == "commits":
            _, plan, goal, script = place
            done, _ = self._commit(table, plan)
            places = (*state.places[:-1], REST)
            yield f"arbiter {goal}: {done}", self._after(state, places, script if done else state.script)
            if state.deaths and self.breaks:
                yield from self._killed_inside(state, plan, script)
        elif place == HEIR:
            table.repair()
            yield "the heir repairs", self._after(state, (*state.places[:-1], REST), state.script)
        else:
            plans = [plan for plan in self._plans(table, state) if plan[0] not in self.forgets]
            for goal, plan, script in plans:
                places = (*state.places[:-1], ("commits", plan, goal, script))
                yield f"arbiter plans {goal} {plan}", self._after(state, places, state.script)
            if state.script < len(self.script) and self.script[state.script].startswith("kill"):
                yield from self._kill(state, int(self.script[state.script][4:]))
        if state.deaths and place != HEIR:
            self.world.restore(state.memory)
            yield "arbiter is killed", self._after(state, (*state.places[:-1], HEIR), state.script, died=True)

    def _kill(self, state: State, victim: int) -> Iterator[tuple[str, State]]:
        """A worker is killed between two of its steps, or at a store of its next section."""
        place = state.places[victim]
        places = (*state.places[:victim], DEAD if place != OVER else OVER, *state.places[victim + 1 :])
        yield f"worker {victim} is killed", self._after(state, places, state.script + 1)
        if self.breaks and len(place) > 1 and isinstance(place[1], Plan):
            for k in self._stores(state, FIRST_ROW + victim, place[1]):
                yield f"worker {victim} is killed at store {k}", self._after(state, places, state.script + 1)

    def _killed_inside(self, state: State, plan: Plan, script: int) -> Iterator[tuple[str, State]]:
        """The arbiter is killed at a store of a section. Whoever asked for another limit asks again, or does not."""
        places = (*state.places[:-1], HEIR)
        self.world.restore(state.memory)
        other = plan.method == "set_limit" and plan.arguments[0] != self.world.words[MAX]  # relative to it
        for k in self._stores(state, ARBITER_ROW, plan):
            if not other:
                yield f"arbiter is killed at store {k}", self._after(state, places, state.script, died=True)
            if other or (plan.method == "set_limit" and script != state.script):
                yield f"arbiter is killed at store {k}, for good", self._after(state, places, script, died=True)

    def _stores(self, state: State, row: int, plan: Plan) -> Iterator[int]:
        """Break a section off at each of its stores, one after the other."""
        for k in itertools.count(1):
            self.world.restore(state.memory)
            breaker = Breaker(k)
            try:
                moves.carry_out(breaking(self.world, row, breaker.store), plan, BreakingLease(breaker.store))
            except Broken:
                yield k
            else:
                return

    def _plans(self, table: Table, state: State) -> Iterator[tuple[str, Plan, int]]:
        """What the arbiter may do next: its goal, the plan, and where in the script it is afterwards."""
        w = table.words
        gate = w[GATE]
        if self.watch and (plan := moves.trim(table, NOW)) is not AGAIN:
            yield "trims", plan, state.script
        for index, at, word in invariants.slots(table):
            if word & STATE == CLOSING:
                plan = moves.pass_on(table, at, word, gate, 0, NOW)
                if plan is not AGAIN:
                    yield f"ends slot {index}", plan, state.script
        scripted = self.script[state.script] if state.script < len(self.script) else ""
        if self.watch and w[HEAD]:
            plan = moves.serve(table, gate, NOW)
            if plan is not AGAIN:
                yield "serves", plan, state.script
        if scripted and not scripted.startswith("kill"):
            plan, more = self._scripted(table, scripted, gate)
            if plan is AGAIN:
                flags = gate & (PAUSED | STOPPED)
                plan, more = Plan("set_limit", (w[MAX], flags, w[RESERVE], w[MAX_PER_KEY])), False  # nothing to do
            yield scripted, plan, state.script + (not more)

    def _scripted(self, table: Table, act: str, gate: int) -> tuple[Plan, bool]:
        """The script's next transition, and whether the same act goes on after it."""
        w = table.words
        flags = gate & (PAUSED | STOPPED)
        limits = {"raise": (w[MAX] + 1, flags), "lower": (w[MAX] - 1, flags), "pause": (w[MAX], PAUSED)}
        limits |= {"resume": (w[MAX], 0), "stop": (w[MAX], STOPPED)}
        if act == "reserve":
            return Plan("set_limit", (w[MAX], flags, 1)), False
        if act in ("one", "two", "any"):  # so many per key
            return Plan("set_limit", (w[MAX], flags, w[RESERVE], {"one": 1, "two": 2, "any": 0}[act])), False
        if act in limits and act != "end":
            return Plan("set_limit", (*limits[act], w[RESERVE], w[MAX_PER_KEY])), False
        limits = {"end": (w[MAX], flags)}
        if act in limits:
            return Plan("set_limit", limits[act]), False
        if act.startswith("reap"):
            return self._reap(table, FIRST_ROW + int(act[4:]), gate)
        if act == "trim" and w[USED] - w[MAX] <= sum(word & STATE == CLOSING for _, _, word in invariants.slots(table)):
            return AGAIN, False
        state = {"expire": IDLE, "trim": IDLE, "doom": LEASED, "revoke": GRANTED}[act]
        for _, at, word in invariants.slots(table):
            if word & STATE == state:
                if act in ("expire", "trim"):
                    return moves.close(table, at, word, 0, NOW, w[VER] if act == "trim" else 0), act == "trim"
                if act == "doom":
                    return Plan("swap", (at, word, word | DOOMED, 0, 0, NOW)), False
                return moves.revoke(table, at, gate, NOW), False
        return AGAIN, False

    def _reap(self, table: Table, row: int, gate: int) -> tuple[Plan, bool]:
        word = self.world.row_word(row)
        if word & STATE != ROW_DEAD and word:
            return Plan("set_row", (row, word, with_state(word, ROW_DEAD), 0, NOW)), True
        for cell in moves.cells_of(table, row):
            return moves.reap_cell(table, cell, gate, NOW), True
        for at in moves.slots_of(table, row):
            return moves.reap_slot(table, at, NOW), True
        return (Plan("set_row", (row, word, 0, 0, NOW)), False) if word else (AGAIN, False)
