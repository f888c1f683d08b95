import subprocess
import sys
import time
from dataclasses import MISSING, fields

import pytest

from infra.errors import PipelineError
from pipelines.training.board import Board, Listener, Reporter, Watch, describe_status
from pipelines.training.loop import train
from pipelines.training.metrics import EpochMetrics, StepStatus


def epoch(number, top1=0.5):
    names = [field.name for field in fields(EpochMetrics) if field.default is MISSING and field.default_factory is MISSING]
    return EpochMetrics(**dict.fromkeys(names, 1.0) | {"epoch": number, "step": 10 * number + 10, "val_top1": top1})


def status(number, step):
    return StepStatus(number, step, 10, 3, 1.25, 12.34, 0.015)


class Told(list):
    def on_progress(self, done, total, text):
        self.append((done, total, text))


def test_a_status_reads_as_a_sentence():
    text = "steps, epoch 2/3: loss 1.250, val top-1 50.0%, 12.3 clips/s, 2% of the time waiting for data"
    assert describe_status(status(1, 4), epoch(0)) == text
    assert (
        describe_status(status(1, 4), epoch(0, None))
        == describe_status(status(1, 4), None)
        == text.replace(", val top-1 50.0%", "")
    )


def test_the_listener_passes_on_each_epoch_once_and_counts_in_steps():
    epochs, told = [], Told()
    listener = Listener(3, epochs.append, told.on_progress)
    listener.say("starting")
    listener.hear_epochs([epoch(0)])
    listener.hear_status(status(1, 4))
    listener.hear_epochs([epoch(0), epoch(1)])
    listener.hear_epochs([epoch(0)])  # an older checkpoint was taken
    listener.say("waiting")
    assert epochs == [epoch(0), epoch(1)]
    assert [line[:2] for line in told] == [(0, 3), (14, 30), (14, 30)]
    assert (told[0][2], told[-1][2]) == ("starting", "waiting")


def test_the_watch_reads_to_the_end_and_tells_nothing_twice():
    board, epochs, told, looks = Board(), [], Told(), []
    with Watch(board.read, Listener(3, epochs.append, told.on_progress), lambda: looks.append(len(told))):
        time.sleep(0.7)
        assert looks == []
        assert board.write_status(vars(status(0, 1))) is False
        time.sleep(1.2)
        board.write_status(vars(status(0, 2)))
        board.write_history([epoch(0).to_json()])
    assert [line[0] for line in told] == [1, 2]
    assert looks[0] == 1
    assert epochs == [epoch(0)]


def test_who_is_asked_to_stop_hears_it_once_the_next_workers_do_not():
    board = Board()
    board.ask_to_stop()
    assert board.write_status(vars(status(0, 3))) is True
    board.write_history([epoch(0).to_json()])
    board.begin()
    assert board.read() == (None, [epoch(0).to_json()])
    assert board.write_status(vars(status(0, 3))) is False


def test_an_error_of_the_listener_comes_out_at_the_end_unless_there_is_another():
    board = Board()
    board.write_history([epoch(0).to_json()])

    def refuse(_):
        raise PipelineError("cannot record")

    with pytest.raises(PipelineError, match="cannot record"), Watch(board.read, Listener(3, refuse), lambda: None):
        time.sleep(0.7)  # it has refused by now, and the block goes on
    with pytest.raises(RuntimeError, match="lost"), Watch(board.read, Listener(3, refuse), lambda: None):
        raise RuntimeError("lost")


def test_the_reporter_tells_all_epochs_of_a_resumed_run_and_few_statuses(tiny, tmp_path):
    def run(told, *, stops):
        reporter = Reporter(tmp_path, statuses.append, told.append)
        train(
            tiny.make_tiny_net(),
            tiny.MemoryLoader(),
            tiny.MemoryLoader(train=False),
            tiny.tiny_settings(epochs=3),
            checkpoint_dir=tmp_path,
            device=tiny.torch.device("cpu"),
            on_step=reporter.on_step,
            on_epoch=reporter.on_epoch,
            should_stop=lambda: stops and any(told),
        )
        return [len(history) for history in told]

    statuses = []
    assert run([], stops=True) == [0, 1]
    assert run([], stops=False) == [1, 2, 3]
    assert 2 <= len(statuses) <= 6


def test_the_board_needs_no_torch():
    """Its process must be there before the workers."""
    code = "import sys, pipelines.training.board; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
