"""Hooks of schedule-driven solvers: what the network is told, what it answered, the history, the direction.

A hook is a frozen dataclass with any of these methods; each is given the :class:`tasks.integrator.Plan`, the number of
the step and the hook's own memory, and returns its answer with the memory that comes next (tensors have rows first):

* ``begin(plan) -> memory``
* ``adapt_time(plan, i, x, t, memory) -> (t, memory)``: the time that the network is told, one number or one a row
* ``answer(plan, i, model, x, t, memory) -> (x0, memory)``: asks the network itself, or some rows of it, or not at all;
  of several hooks with it the first answers, and ``spent(memory)`` is what every row has asked for;
* ``transform_output(plan, i, x, x0, t, memory) -> (x0, memory)``: the clean prediction
* ``settle(plan, i, x, x0, memory) -> x``: the state, once its prediction is known
* ``compensate(plan, i, entries, memory) -> (entries, memory)``: the history, newest first
* ``direction(plan, i, u, entries, memory) -> (u, memory)``: the weighted mean of the predictions, in the step's form
* ``land(plan, i, x, entries, memory) -> (x, memory)``: the state at the end of the step
* ``check(plan)``: refuse a schedule that it does not fit
"""
