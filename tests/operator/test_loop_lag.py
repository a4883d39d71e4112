"""The lag of the event loop, by which the liveness probe is answered."""

from __future__ import annotations

import asyncio

from stagecoach_operator.loop_lag import BEAT_SECONDS, LoopLag


def test_the_lag_is_what_a_beat_takes_beyond_its_pause() -> None:
    now, lags = [100.0], list[float]()

    async def sleep(seconds: float) -> None:
        now[0] += seconds + (3.0 if len(lags) == 1 else 0.0)
        if len(lags) == 3:
            raise asyncio.CancelledError
        await asyncio.sleep(0)

    async def scenario() -> None:
        lag = LoopLag(clock=lambda: now[0], sleep=sleep, observe=lags.append)
        try:
            await lag.measure()
        except asyncio.CancelledError:
            now[0] += 40.0
        assert lag.seconds() >= 40.0

    asyncio.run(scenario())
    assert lags == [0.0, 3.0, 0.0]
    assert BEAT_SECONDS < 1.0
