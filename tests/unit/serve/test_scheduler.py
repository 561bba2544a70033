"""Requests share the batch, keep their places, and never hear each other's text."""

import queue
import threading
import time

import pytest
import torch

from pocketlm.core.errors import NumericError, ResourceError
from pocketlm.runtime.generate import generate_ids
from pocketlm.runtime.sampling import Sampling
from pocketlm.serve.limits import Limits, fitting
from pocketlm.serve.scheduler import Ask, Busy, End, Piece, Scheduler, TimeUp

WAIT = 60


class Ear:
    """Hears what a request is told; the scheduler's thread waits in it until `goes_on` is set."""

    def __init__(self, scheduler, ask, goes_on=None):
        self.heard, self.goes_on = queue.SimpleQueue(), goes_on
        self.ticket = scheduler.submit(ask, self.hear)

    def hear(self, event):
        self.heard.put(event)
        if self.goes_on is not None:
            assert self.goes_on.wait(WAIT)

    def all(self):
        """Text, and the last event."""
        text = ""
        while True:
            event = self.heard.get(timeout=WAIT)
            if not isinstance(event, Piece):
                return text, event
            text += event.text


@pytest.fixture
def make(model, tokenizer):
    made = []

    def make(**limits):
        given = {"concurrency": 4, "positions": 200, **limits}
        made.append(Scheduler(model, tokenizer, Limits(**given)))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close(0)


def prompts(tokenizer, count):
    return [tuple(tokenizer(f"prompt {i} " * (1 + i % 3))["input_ids"]) for i in range(count)]


def test_many_at_once_get_what_they_get_alone(make, model, tokenizer):
    scheduler = make(queue=50)
    asks = [
        Ask(ids, max_tokens=8 + i % 9, sampling=Sampling(0.8 * (i % 2)), seed=i)
        for i, ids in enumerate(prompts(tokenizer, 24))
    ]
    ears = [Ear(scheduler, ask) for ask in asks]
    for ask, ear in zip(asks, ears, strict=True):
        text, end = ear.all()
        assert end == End("length", ask.max_tokens) or end.stopped_by == "end"
        if ask.sampling.temperature == 0:
            alone = generate_ids(model, tokenizer, ask.prompt, max_new_tokens=ask.max_tokens)
            assert text == alone.text
        else:
            assert text == Ear(scheduler, ask).all()[0]


def test_a_full_queue_refuses(make, tokenizer):
    scheduler = make(concurrency=1, queue=2)
    ids = prompts(tokenizer, 1)[0]
    long = Ear(scheduler, Ask(ids, max_tokens=150))
    while scheduler.waiting:
        time.sleep(0.001)
    waiting = [Ear(scheduler, Ask(ids, max_tokens=1)) for _ in range(2)]
    with pytest.raises(Busy):
        scheduler.submit(Ask(ids, max_tokens=1), print)
    long.ticket.cancel()
    assert [ear.all()[1].tokens for ear in waiting] == [1, 1]


def test_a_cancelled_row_is_free_at_once(make, tokenizer):
    scheduler = make(concurrency=1)
    ids = prompts(tokenizer, 1)[0]
    forever = Ear(scheduler, Ask(ids, max_tokens=10**6))
    forever.heard.get(timeout=WAIT)
    after = Ear(scheduler, Ask(ids, max_tokens=2))
    forever.ticket.cancel()
    assert after.all()[1].tokens == 2


def test_time_ends_an_answer_and_a_wait(make, tokenizer):
    scheduler = make(concurrency=1)
    ids = prompts(tokenizer, 1)[0]
    cut, waiting = (Ear(scheduler, Ask(ids, max_tokens=10**6)) for _ in range(2))
    assert cut.heard.get(timeout=WAIT).text
    waiting.ticket.until = cut.ticket.until = 0.0
    assert cut.all()[1].stopped_by == "time"
    assert isinstance(waiting.all()[1], TimeUp)


def test_a_step_that_fails_is_told_and_the_next_works(make, tokenizer, monkeypatch):
    scheduler = make()
    ids = prompts(tokenizer, 1)[0]

    def fail(tokens):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("no memory\nand more")

    monkeypatch.setattr(scheduler._batch, "advance", fail)
    _, error = Ear(scheduler, Ask(ids, max_tokens=5)).all()
    assert isinstance(error, ResourceError)
    assert "no memory" in str(error)
    assert Ear(scheduler, Ask(ids, max_tokens=5)).all()[1].tokens == 5


def test_logits_that_are_not_finite_are_an_error(make, tokenizer, monkeypatch):
    scheduler = make()
    ids = prompts(tokenizer, 1)[0]
    join = scheduler._batch.join
    monkeypatch.setattr(scheduler._batch, "join", lambda prompt: join(prompt) * float("nan"))
    assert isinstance(Ear(scheduler, Ask(ids, max_tokens=5)).all()[1], NumericError)


def test_closing_lets_answers_end_and_refuses_the_rest(make, tokenizer):
    scheduler = make(concurrency=1)
    ids = prompts(tokenizer, 1)[0]
    goes_on = threading.Event()
    running = Ear(scheduler, Ask(ids, max_tokens=30), goes_on)
    waiting = Ear(scheduler, Ask(ids, max_tokens=30))
    running.heard.get(timeout=WAIT)
    closer = threading.Thread(target=scheduler.close, args=(WAIT,))
    closer.start()
    while scheduler._closing is None:
        time.sleep(0.001)
    goes_on.set()
    assert isinstance(waiting.all()[1], Busy)
    assert running.all()[1].tokens == 30
    closer.join(WAIT)
    assert not scheduler.alive
    with pytest.raises(Busy):
        scheduler.submit(Ask(ids, max_tokens=1), print)


def test_closing_without_grace_cuts_answers_off(make, tokenizer):
    scheduler = make()
    forever = Ear(scheduler, Ask(prompts(tokenizer, 1)[0], max_tokens=10**6))
    forever.heard.get(timeout=WAIT)
    scheduler.close(0)
    assert isinstance(forever.all()[1], Busy)


def test_memory_bounds_answers_at_once(model, monkeypatch):
    each = 2 * 2 * 2 * 16 * 4  # two layers of keys and values, two heads of 16 floats

    def with_room(positions, **wanted):
        monkeypatch.setattr(
            "pocketlm.serve.limits.available_ram_bytes", lambda: 2 * each * positions
        )
        return fitting(model, **wanted)

    assert model.config.max_position_embeddings == 2048
    assert with_room(64 * 2048) == (64, 2048)
    assert with_room(5 * 2048) == (4, 2048)
    assert with_room(64 * 100, context=100) == (64, 100)
    assert with_room(5 * 100, concurrency=5) == (5, 100)
    with pytest.raises(ResourceError):
        with_room(99, concurrency=1, context=100)
