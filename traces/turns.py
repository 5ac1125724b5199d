"""Sessions of a capture: which requests are turns of one conversation, and which waited for which.

A session is what the client calls one, in a header or in the body; else requests are one
conversation where a prompt begins with the whole prompt of an earlier request, followed by what the
assistant said. Only keyed digests are kept, of a bounded number of requests, and only those of this
writer: turns that reached other workers are not linked.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from tokentape.traces.privacy import Privacy
from tokentape.traces.wire import Prompt, RequestFacts
from tokentape.traces.wire.request_body import ROLE_END
from tokentape.traces.words import SESSION_HEADERS

MOST_PROMPTS = 50_000  # whose continuation is looked for: some 20 MB
MOST_SESSIONS = 20_000
MOST_MEMBERS = 64  # of a session, the latest, among whom it is looked who waited for whom
MOST_ALIKE = 8  # requests with one prompt
# How the canonical text of what the assistant said begins: OpenAI's and Anthropic's word, Google's.
_ANSWERS = (b"assistant" + ROLE_END, b"model" + ROLE_END)
_ANSWERED = ("ok", "client_abort")


@dataclass
class Turn:
    """What an open request told of its place; digests only.

    What the client called its session is in the row at once, and so survives this process.
    """

    session_id: str | None = None
    source: str | None = None  # header or body
    previous: int | None = None  # the response that this request says it follows
    prompt: int | None = None  # all of it
    begins_with: list[int] = field(default_factory=list)  # beginnings that an answer follows
    root: int | None = None  # the prompt of the first turn, whose answer all later ones repeat
    draw: int = 0  # of its session, known at the end: see `keep.py`


@dataclass
class Member:
    """A request that has ended."""

    request_id: bytes
    session_id: str
    turn_index: int
    arrival_ns: int
    end_ns: int
    parents: list[bytes]
    draw: int
    continued: bool = False


class Turns:
    """Takes requests as they end; `close` says where each belongs."""

    def __init__(self, privacy: Privacy, headers: Iterable[bytes] = ()) -> None:
        """`headers`: names in lower case by which clients name sessions, before the known ones."""
        self._privacy = privacy
        self._headers = (*headers, *SESSION_HEADERS)
        self._prompts: OrderedDict[int, list[Member]] = OrderedDict()
        self._responses: OrderedDict[int, Member] = OrderedDict()
        self._sessions: OrderedDict[str, list[Member]] = OrderedDict()

    @staticmethod
    def named(turn: Turn) -> dict[str, Any]:
        """The columns that are known before the request has ended."""
        if turn.session_id is None:
            return {}
        return {"session_id": turn.session_id, "session_source": turn.source}

    def told_by_head(self, headers: Iterable[tuple[bytes, bytes]]) -> Turn:
        """What the request's headers say; the first that names a session counts."""
        named = {name.lower(): value for name, value in headers}
        for name in self._headers:
            if value := named.get(name):
                return Turn(self._privacy.digest(value, "session"), "header")
        return Turn()

    def told_by_body(self, turn: Turn, facts: RequestFacts) -> None:
        """What the body says, and digests of its prompt where the mode allows them."""
        if facts.session and turn.session_id is None:
            turn.session_id = self._privacy.digest(facts.session.encode(), "session")
            turn.source = "body"
        if facts.previous:
            turn.previous = self._mark(facts.previous.encode(), b"response")
        prompt = facts.prompt
        if prompt is not None and prompt.ends and self._privacy.mode != "none":
            self._digest(turn, prompt)

    def _digest(self, turn: Turn, prompt: Prompt) -> None:
        text = memoryview(prompt.text or b"")
        found = blake2b(digest_size=8, key=self._privacy.key, person=b"prompt so far")
        at = 0
        for end in prompt.ends:
            found.update(text[at:end])
            at = end
            if any(text[end : end + len(word)] == word for word in _ANSWERS):
                turn.begins_with.append(int.from_bytes(found.digest()))
        if at == len(text):
            turn.prompt = int.from_bytes(found.digest())
        turn.root = turn.begins_with[0] if turn.begins_with else turn.prompt

    def _mark(self, value: bytes, person: bytes) -> int:
        made = blake2b(value, digest_size=8, key=self._privacy.key, person=person)
        return int.from_bytes(made.digest())

    def close(self, turn: Turn, row: dict[str, Any]) -> dict[str, Any]:
        """The session columns of a request that has ended; later ones may wait for it."""
        follows = self._follows(turn, row["arrival_ns"])
        turn.draw = self._draw(turn, follows, row["request_id"])
        session_id, source = turn.session_id, turn.source
        if session_id is None and follows is not None:
            session_id, source = follows.session_id, "body" if turn.previous else "prefix"
        if session_id is None:
            if turn.prompt is None:
                return {}
            session_id = self._privacy.digest(row["request_id"], "session")
            source = "prefix"
        waited = [follows] if follows else self._waited(session_id, row["arrival_ns"])
        for one in waited:
            one.continued = True
        columns: dict[str, Any] = {
            "session_id": session_id,
            "session_source": source,
            "turn_index": 1 + max((one.turn_index for one in waited), default=-1),
        }
        if waited:
            columns["parents"] = [one.request_id for one in waited]
            columns["think_ns"] = row["arrival_ns"] - max(one.end_ns for one in waited)
        self._remember(turn, row, columns)
        return columns

    def alone(self, row: dict[str, Any]) -> int:
        """The draw of a request of which nothing else is known."""
        return self._draw(Turn(), None, row["request_id"])

    def _draw(self, turn: Turn, follows: Member | None, request_id: bytes) -> int:
        """A number that all turns of a session share, on whatever worker they are.

        It hangs on the session's name, else on the first turn's prompt, which every turn repeats;
        where a turn says only which response it follows, on what this writer knows of that one.
        """
        if turn.session_id is not None:
            return self._mark(turn.session_id.encode(), b"sample session")
        if follows is not None:
            return follows.draw
        if turn.root is not None:
            return self._mark(turn.root.to_bytes(8), b"sample root")
        return self._mark(request_id, b"sample request")

    def _follows(self, turn: Turn, arrival_ns: int) -> Member | None:
        """The request whose answer this one goes on from: as it says, else by its prompt."""
        if turn.previous is not None and (named := self._responses.get(turn.previous)):
            return named
        for beginning in reversed(turn.begins_with):
            ended = [m for m in self._prompts.get(beginning, ()) if m.end_ns <= arrival_ns]
            if ended:  # of several with one prompt the latest, one that nobody went on from first
                return max(ended, key=lambda m: (not m.continued, m.end_ns))
        return None

    def _waited(self, session_id: str, arrival_ns: int) -> list[Member]:
        """Those of the session that had ended, and that none of them had waited for.

        Order in time, not proof of a dependency; two that came at once waited for the same.
        """
        ended = [m for m in self._sessions.get(session_id, ()) if m.end_ns <= arrival_ns]
        waited_for = {parent for member in ended for parent in member.parents}
        return [member for member in ended if member.request_id not in waited_for]

    def _remember(self, turn: Turn, row: dict[str, Any], columns: dict[str, Any]) -> None:
        member = Member(
            row["request_id"],
            columns["session_id"],
            columns["turn_index"],
            row["arrival_ns"],
            row["end_ns"],
            columns.get("parents", []),
            turn.draw,
        )
        if turn.source is not None:
            _keep(self._sessions, member.session_id, member, MOST_SESSIONS, MOST_MEMBERS)
        if row.get("outcome") not in _ANSWERED:
            return
        if turn.prompt is not None:
            _keep(self._prompts, turn.prompt, member, MOST_PROMPTS, MOST_ALIKE)
        if row.get("response_id"):
            self._responses[self._mark(str(row["response_id"]).encode(), b"response")] = member
            if len(self._responses) > MOST_PROMPTS:
                self._responses.popitem(last=False)


def _keep[K](
    kept: OrderedDict[K, list[Member]], key: K, member: Member, most: int, most_each: int
) -> None:
    """Add a member under a key, and forget the key that was used least lately."""
    members = kept.setdefault(key, [])
    members.append(member)
    del members[:-most_each]
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
