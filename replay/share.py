"""What one worker sends of a plan: when each request is due, and how its body is built.

A share can be sent to another process. It holds a few numbers per request; ids, sessions and
blocks are read from the tape when they are needed, so a request is the same whoever builds it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from yarl import URL

from tokentape.replay.aborts import Aborts
from tokentape.replay.ahead import Outgoing
from tokentape.replay.apis import APIS, Endpoint, Wanted, endpoint
from tokentape.replay.bodies import with_model
from tokentape.replay.prompts import Draws, PromptSource
from tokentape.replay.rows import Positions, ReadAhead, TapeRows
from tokentape.replay.schedule import Ints
from tokentape.replay.targets import Address, Form, Target
from tokentape.replay.turns import Waits
from tokentape.traces.wire import read_request

_UNQUOTED = "!#$%&'()*+,/:;=?@[]|<>{}^"  # of a session's name in a header: visible ASCII


@dataclass
class Share:
    """Requests in the order of their due times, which count from the start of the whole run.

    waits: who waits for whom; then a due time is the earliest one (see `turns.Waits`).
    positions: int32[n], the rows of the tape. copies: int16[n], which copy of its row each request
    is (see `schedule.Schedule`). The other arrays have an entry per row of the tape
    when `by_row` is set, else one per request.
    """

    due_ns: Ints
    waits: Waits | None
    aborts: Aborts
    positions: Positions
    copies: NDArray[np.int16]
    input_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    apis: NDArray[np.int8]  # in which each came, see `apis.ENDPOINTS`
    stream: NDArray[np.bool_]
    places: NDArray[np.int32] | None  # by request: which of the target's addresses; None: one
    by_row: bool
    rows: TapeRows
    tape_id: str
    seed: int
    namespace: str
    session_header: str | None
    wanted_endpoint: Wanted
    target: Target
    peak_in_flight: int
    timeout_ns: int | None
    first_byte_timeout_ns: int | None
    precise: bool
    verbatim: bool = False  # recorded bodies are sent again

    def __len__(self) -> int:
        return len(self.due_ns)

    def part(self, kept: NDArray[np.int32], peak_in_flight: int) -> "Share":
        """Some of its requests, by number."""
        place = self.positions[kept] if self.by_row else kept
        return replace(
            self,
            due_ns=self.due_ns[kept],
            waits=self.waits.part(kept) if self.waits is not None else None,
            aborts=self.aborts.of(self.positions[kept]),
            positions=self.positions[kept],
            copies=self.copies[kept],
            input_tokens=self.input_tokens[place],
            output_tokens=self.output_tokens[place],
            apis=self.apis[place],
            stream=self.stream[place],
            places=self.places[kept] if self.places is not None else None,
            by_row=False,
            peak_in_flight=peak_in_flight,
        )

    def read_ahead(self) -> ReadAhead:
        """A reader of the rows that come next."""
        return ReadAhead(self.rows, self.positions)

    def outgoing(self, number: int) -> Outgoing:
        """The i-th request, body and all."""
        position, copy = int(self.positions[number]), int(self.copies[number])
        place = position if self.by_row else number
        form = self._form(number)
        input_tokens = int(self.input_tokens[place])
        output_tokens = max(1, int(self.output_tokens[place]))
        stream = bool(self.stream[place])
        asked_tokens, leaving = output_tokens, self.aborts.by_row.get(position)
        if leaving is not None:
            most = self.target.max_model_tokens
            asked_tokens = leaving.asked(output_tokens, input_tokens, most)
        if self.verbatim:
            return self._as_recorded(number, form, stream=stream)
        draws = self._draws(number, form)
        row = self.rows.columns(position, copy) | form.columns(asked_tokens, stream=stream)
        row |= {
            "endpoint": self._address(number).path(form.endpoint),
            "source_request_id": self.rows.request_id(position),
            "copy_index": copy,
            "planned_input_tokens": input_tokens,
            "planned_output_tokens": output_tokens,
        }
        if self.target.others:
            row["server_id"] = self._address(number).name
        body = form.body(draws, asked_tokens, stream=stream)
        url, headers = self._url(number, form.endpoint), self._headers_of(form.endpoint, row)
        return self._leaving(Outgoing(url, headers, body, row), position)

    def _as_recorded(self, number: int, form: Form, *, stream: bool) -> Outgoing:
        """The i-th request with its recorded body; how long it is, the candidate tells."""
        position, copy = int(self.positions[number]), int(self.copies[number])
        address, (recorded, posted_to) = self._address(number), self.rows.body(position)
        url = self._url(number, form.endpoint)
        if APIS[form.endpoint].at_root:  # these have several paths, which mean different things
            url = URL(f"{address.root}/{posted_to.rpartition('/')[2]}")
        body = with_model(recorded, form.model)
        row = self.rows.columns(position, copy)
        row |= {"wire_format": APIS[form.endpoint].wire_format, "stream": stream}
        row |= read_request(url.path, body).columns
        row |= {"endpoint": url.path, "copy_index": copy}
        row["source_request_id"] = self.rows.request_id(position)
        if self.target.others:
            row["server_id"] = address.name
        headers = self._headers_of(form.endpoint, row)
        return self._leaving(Outgoing(url, headers, body, row), position)

    def _leaving(self, outgoing: Outgoing, position: int) -> Outgoing:
        """The same, to be left where its recorded client left."""
        leaving = self.aborts.by_row.get(position)
        if leaving is None:
            return outgoing
        if outgoing.row["stream"] and leaving.events > 0:
            return replace(outgoing, leave_events=leaving.events)
        return replace(outgoing, leave_after_ns=leaving.after_ns)

    def beginning(self, number: int, blocks: int) -> Outgoing:
        """A request for one token, whose prompt is the first blocks of the i-th request's."""
        form = self._form(number)
        draws = self._draws(number, form, blocks)
        body = form.body(draws, 1, stream=False)
        row = self.rows.columns(int(self.positions[number]), int(self.copies[number]))
        url = self._url(number, form.endpoint)
        return Outgoing(url, self._headers_of(form.endpoint, row), body, row)

    def _form(self, number: int) -> Form:
        position = int(self.positions[number])
        recorded = int(self.apis[position if self.by_row else number])
        model = self.rows.model(position) if self.target.models else None
        return self.target.form(endpoint(self.wanted_endpoint, recorded), model)

    def _draws(self, number: int, form: Form, most_blocks: int | None = None) -> Draws:
        """Of the i-th prompt, or of no more of its beginning than so many blocks."""
        position, copy = int(self.positions[number]), int(self.copies[number])
        units = form.length.units(int(self.input_tokens[position if self.by_row else number]))
        blocks = self.rows.blocks(position).of_copy(copy)
        if form.length.per_unit != 1:  # a block is as long as it was in tokens, not in units
            of_units = max(1, round(blocks.block_tokens / form.length.per_unit))
            blocks = replace(blocks, block_tokens=of_units)
        if most_blocks is not None:
            units = min(units, most_blocks * blocks.block_tokens)
        return self._prompts.draws(self.rows.request_id(position), units, blocks, copy=copy)

    def _headers_of(self, endpoint: Endpoint, row: dict[str, Any]) -> dict[str, str]:
        session_id, headers = row.get("session_id"), self._headers[endpoint]
        if self.session_header is None or session_id is None:
            return headers
        return headers | {self.session_header: quote(session_id, safe=_UNQUOTED)}

    @cached_property
    def _prompts(self) -> PromptSource:
        return PromptSource(self.tape_id, self.seed, self.namespace)

    def _address(self, number: int) -> Address:
        """Where the i-th request goes."""
        addresses = self.target.addresses
        place = int(self.places[number]) if self.places is not None else 0
        return addresses[place % len(addresses)]  # a null server stands for all

    def _url(self, number: int, endpoint: Endpoint) -> URL:
        return self._urls[self._address(number), endpoint]

    @cached_property
    def _urls(self) -> dict[tuple[Address, Endpoint], URL]:
        pairs = ((a, e) for a in self.target.addresses for e in self.target.forms)
        return {(a, e): URL(a.url(e)) for a, e in pairs}

    @cached_property
    def _headers(self) -> dict[Endpoint, dict[str, str]]:
        own = self.target.headers.for_sending()
        return {e: {**APIS[e].headers, **own} for e in self.target.forms}
