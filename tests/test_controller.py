"""The control law, by numbers. Each test of a correction fails if the published behaviour comes back."""

import itertools
import json
import random
import statistics

import pytest

from safe_train.algorithms.controller import Controller, Ema, Moments
from safe_train.config import SafeConfig


def controller(**settings) -> Controller:
    return Controller(SafeConfig(**{"total_steps": 40} | settings))


def drive(control, kls, rewards=None, entropy=2.0, reward_std=1.0):
    rewards = [0.0] * len(kls) if rewards is None else rewards
    return [control.update(kl, entropy, reward, reward_std) for kl, reward in zip(kls, rewards, strict=True)]


def law(observed, c, window):
    """The control law from the whole history at once, as docs/algorithm.md has it: (kl_coef, tau, phase) by step."""
    kls, entropies, rewards, stds = zip(*observed, strict=True)
    ages = range(len(kls))
    smooth = [weighted(rewards[: t + 1], 0.95) for t in ages]
    velocity = [0.0] + [(smooth[t] - smooth[t - 1]) / stds[t] for t in ages if t > 0]
    sums = list(itertools.accumulate(velocity, lambda total, v: min(1.0, max(-1.0, total + v))))
    hold, found = 0.0, []
    for t in ages:
        phase, scale = "warmup", 1.5
        if t + 1 >= 2 * window:
            recent, before = (statistics.fmean(rewards[t + 1 - k * window : t + 1 - (k - 1) * window]) for k in (1, 2))
            gained = recent - statistics.fmean(rewards[:window])
            steady = statistics.pstdev(rewards[t + 1 - window : t + 1]) < 0.1 * stds[t]
            if recent - before > 0.1 * stds[t]:
                phase, scale = "climbing", 1.2
            else:
                phase, scale = ("converged", 1.0) if gained > stds[t] and steady else ("plateau", 0.8)
        slope = velocity[t] - (velocity[t - 1] if t else 0.0)
        pid = c.pid_kp * velocity[t] + c.pid_ki * sums[t] + c.pid_kd * slope
        tau = min(c.kl_threshold_max, max(c.kl_threshold_min, (c.kl_threshold + pid) * scale))
        gate = min(c.gate_max, max(c.gate_min, 0.5 * entropies[0] / (entropies[t] + 0.1)))
        excess = weighted(kls[: t + 1], min(0.9, 1 - 1 / window)) - tau
        rise = kls[t] - kls[t - window] if t >= window else 0.0
        hold = min(1.0, max(0.0, hold + c.kl_integral_coef * excess))
        adaptive = c.kl_excess_coef * max(0.0, excess) + c.kl_momentum_coef * max(0.0, rise)
        found.append((c.beta + gate * adaptive + hold, tau, phase))
    return found


def weighted(values, decay):
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("settings", [{}, {"window": 5, "kl_integral_coef": 0.1, "pid_ki": 0.1, "kl_threshold": 0.2}])
def test_the_law_of_a_long_history(settings):
    draw = random.Random(0)
    climb = [min(max(0, t - 40), 40) / 10 for t in range(120)]  # level, up, level: all phases
    observed = [(draw.uniform(0, 1), draw.uniform(0.2, 3), level + 0.02 * draw.gauss(0, 1), 0.5) for level in climb]
    control = controller(total_steps=120, **settings)
    wanted = law(observed, control.args, control.window)
    for step, (kl_coef, tau, phase) in zip(observed, wanted, strict=True):
        found = control.update(*step)
        assert (found.kl_coef, found.kl_threshold) == pytest.approx((kl_coef, tau)) and found.phase == phase
    assert {phase for *_, phase in wanted} == {"warmup", "climbing", "plateau", "converged"}


def test_the_integral_holds_a_kl_that_the_proportional_part_lets_drift():
    """A policy whose KL falls by 2 nats for each unit of the coefficient, from 1 without any."""
    settings = {"pid_kp": 0, "pid_ki": 0, "pid_kd": 0, "phases": False, "total_steps": 200, "kl_threshold": 0.3}
    held = {}
    for coefficient in (0.0, 0.05):
        control, kl = controller(kl_integral_coef=coefficient, **settings), 0.0
        for _ in range(200):
            kl += 0.3 * (max(0.0, 1 - 2 * control.update(kl, 2.0, 0.0, 1.0).kl_coef) - kl)
        held[coefficient] = kl
    assert held[0.05] == pytest.approx(0.3, abs=1e-3) and held[0.0] > 0.6
    switched_off = controller(kl_integral_coef=0.0, **settings)
    switched_off.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert control.last.kl_integral > 0.3 and drive(switched_off, [0.0])[0].kl_coef == control.args.beta
    released = drive(control, [0.0] * 100)[-1]
    assert released.kl_integral == 0 and released.kl_coef == control.args.beta


def test_averages_start_at_the_first_observation():
    """The published averages start at 0, so the controller is blind for the first rollouts."""
    first = drive(controller(), [0.4])[0]
    assert first.kl_short == pytest.approx(0.4) and first.kl_long == pytest.approx(0.4)


def test_the_short_average_is_short_beside_the_run():
    decays = {steps: controller(total_steps=steps).kl_short.decay for steps in (30, 60, 100, 2000)}
    assert decays == pytest.approx({30: 2 / 3, 60: 5 / 6, 100: 0.9, 2000: 0.9})
    assert controller(total_steps=30, ema_short=0.5).kl_short.decay == 0.5


def test_bias_corrected_average_of_a_constant_is_the_constant():
    average = Ema(0.99)
    assert [average.update(3.0) for _ in range(50)] == pytest.approx([3.0] * 50)


def test_coefficient_is_the_anchor_below_the_threshold_and_grows_above_it():
    settings = {"pid_kp": 0, "pid_ki": 0, "pid_kd": 0, "phases": False, "entropy_gate": False, "kl_momentum_coef": 0}
    control = controller(beta=0.01, kl_threshold=0.3, kl_excess_coef=0.5, **settings)
    low, high = drive(control, [0.2])[0], drive(controller(beta=0.01, **settings), [0.9])[0]
    assert low.kl_coef == 0.01 and low.kl_penalty == 0
    assert high.kl_coef == pytest.approx(0.01 + 0.5 * (0.9 - 0.3))


def test_fixed_controller_observes_and_never_acts():
    trace = drive(controller(controller="fixed", beta=0.02, kl_integral_coef=0.1), [0.1, 0.5, 2.0])
    assert [c.kl_coef for c in trace] == [0.02] * 3
    assert trace[-1].kl_penalty > 0
    assert trace[-1].kl_integral == 0  # nothing learned that a run resumed with `controller: safe` would jump to


def test_momentum_charges_a_rise_over_the_window_and_not_a_fall():
    settings = {"window": 3, "kl_excess_coef": 0, "beta": 0, "entropy_gate": False}
    rise = drive(controller(**settings), [0.0, 0.1, 0.2, 0.3, 0.4])
    assert [c.kl_momentum for c in rise] == pytest.approx([0, 0, 0, 0.3, 0.3])
    assert [c.kl_coef for c in rise] == pytest.approx([0, 0, 0, 0.15, 0.15])
    fall = drive(controller(**settings), [0.4, 0.3, 0.2, 0.1, 0.0])
    assert fall[-1].kl_momentum < 0 and fall[-1].kl_coef == 0


def test_gate_is_bounded_and_its_floor_follows_the_model():
    """The published floor is 2 nats for every model, and the gate reaches 20 at entropy 0."""
    control = controller()
    assert control.update(0, 0.5, 0, 1).entropy_floor == 0.25
    assert control.update(0, 0.0, 0, 1).entropy_gate == pytest.approx(2.5)
    assert control.update(0, 9.0, 0, 1).entropy_gate == 0.5
    assert controller(entropy_floor=3.0).update(0, 0.0, 0, 1).entropy_gate == 4.0


def test_gate_scales_only_the_adaptive_part():
    settings = {"beta": 0.01, "kl_momentum_coef": 0, "phases": False}
    open_gate, half_gate = (drive(controller(entropy_floor=f, **settings), [0.9])[0] for f in (2.1, 1.05))
    assert open_gate.kl_coef - 0.01 == pytest.approx(2 * (half_gate.kl_coef - 0.01))


def test_pid_moves_the_threshold_with_the_velocity_of_the_reward():
    """The published PID stays in [-0.011, 0]: no control."""
    rising = drive(controller(phases=False), [0.0] * 30, rewards=[0.2 * i for i in range(30)])
    falling = drive(controller(phases=False), [0.0] * 30, rewards=[-0.2 * i for i in range(30)])
    assert rising[-1].pid > 0.05 and rising[-1].kl_threshold > 0.35
    assert falling[-1].pid < -0.05 and falling[-1].kl_threshold < 0.25


def test_pid_does_not_depend_on_the_scale_of_the_reward():
    small = drive(controller(), [0.0] * 20, rewards=[0.01 * i for i in range(20)], reward_std=0.1)
    large = drive(controller(), [0.0] * 20, rewards=[10.0 * i for i in range(20)], reward_std=100.0)
    assert [c.pid for c in small] == pytest.approx([c.pid for c in large])


def test_pid_of_constant_rewards_is_zero():
    assert all(c.pid == 0 for c in drive(controller(), [0.0] * 10, rewards=[0.7] * 10, reward_std=0.0))


def test_threshold_stays_in_its_bounds():
    trace = drive(controller(), [0.1] * 60, rewards=[(-1) ** i * 50.0 for i in range(60)])
    assert all(0.1 <= c.kl_threshold <= 0.6 for c in trace)


def test_a_short_run_leaves_warm_up():
    """The published windows are 50 and 100 calls: a run of 40 steps would end in its warm-up."""
    trace = drive(controller(total_steps=40), [0.0] * 40, rewards=[0.1 * i for i in range(40)])
    assert trace[0].phase == "warmup" and trace[10].phase == "climbing"


def test_phases_are_judged_in_units_of_the_reward_spread():
    rewards = [0.1 * i for i in range(20)] + [2.0] * 20
    for scale in (1.0, 1000.0):
        scaled = [scale * r for r in rewards]
        trace = drive(controller(window=4), [0.0] * 40, rewards=scaled, reward_std=0.5 * scale)
        assert trace[15].phase == "climbing" and trace[-1].phase == "converged"
    assert drive(controller(window=4), [0.0] * 40, rewards=[0.0] * 40)[-1].phase == "plateau"


def test_state_survives_json():
    control, fresh = controller(), controller()
    drive(control, [0.1 * i for i in range(9)], rewards=[0.3 * i for i in range(9)])
    fresh.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert fresh.update(0.7, 1.0, 3.0, 1.0) == control.update(0.7, 1.0, 3.0, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_is_not_observed(place, bad):
    observation, control = [0.9, 1.0, 2.0, 1.0], controller()
    poisoned = [*observation[:place], bad, *observation[place + 1 :]]
    assert control.update(*poisoned).kl_coef == control.args.beta
    before = control.update(*observation)
    assert control.update(*poisoned) == before and before.kl_coef > control.args.beta
    fresh = controller()
    fresh.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert fresh.update(*poisoned) == before
    alone = controller()
    alone.update(*observation)
    assert control.update(*observation) == alone.update(*observation)


def test_a_resumed_controller_has_the_settings_that_are_given():
    old, given = (
        controller(ema_short=0.9, entropy_floor=1.0),
        controller(ema_short=0.5, entropy_floor=2.0),
    )
    drive(old, [0.4, 0.4])
    given.load_state_dict(json.loads(json.dumps(old.state_dict())))
    found = given.update(0.8, 1.0, 0.0, 1.0)
    assert found.entropy_floor == 2.0 and found.kl_short == pytest.approx(
        (0.5 * 0.19 * 0.4 + 0.5 * 0.8) / (0.5 * 0.19 + 0.5)
    )
    left_alone = controller()
    left_alone.load_state_dict(old.state_dict())
    assert left_alone.update(0.4, 1.0, 0.0, 1.0).entropy_floor == 1.0


def test_a_run_that_is_made_longer_keeps_its_window():
    old, longer, given = (controller(total_steps=steps, window=w) for steps, w in ((50, None), (500, None), (50, 7)))
    drive(old, [0.1 * i for i in range(12)])
    for control in (longer, given):
        control.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert (longer.window, given.window) == (5, 7) and given.kl_short.decay == pytest.approx(6 / 7)
    assert longer.update(0.9, 1.0, 0.5, 1.0) == old.update(0.9, 1.0, 0.5, 1.0)


def test_moments_match_all_values_at_once():
    values = [0.3, -1.0, 5.0, 2.0, 2.0, 7.5, -3.25]
    moments = Moments()
    for part in (values[:1], values[1:4], [], values[4:]):
        moments.update(part)
    assert moments.mean == pytest.approx(statistics.fmean(values))
    assert moments.std == pytest.approx(statistics.pstdev(values))
