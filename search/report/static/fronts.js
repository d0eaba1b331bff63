// Fronts, their hypervolume, and the trial to take. The same rules as in `tightrope/search/pareto.py`.

/** Of points {x, y, order}, both to be minimised, those that no other beats, by ascending x. */
export function nonDominated(points) {
  const sorted = [...points].sort((a, b) => a.x - b.x || a.y - b.y || a.order - b.order);
  let least = Infinity;
  return sorted.filter((point) => point.y < least && ((least = point.y), true));
}

/** Area between a front (minimised, ascending x) and a reference point that is worse than the points that count. */
export function area(front, reference) {
  let sum = 0;
  let last = reference.y;
  for (const { x, y } of front) {
    if (x >= reference.x || y >= last) continue;
    sum += (reference.x - x) * (last - y);
    last = y;
  }
  return sum;
}

/** The cost that a run's trials are compared by: the first that the budget bounds. */
function priceOf(run) {
  const [bounded] = Object.keys(run.study.limits ?? {});
  return run.columns[aimsAtCost(run) ? "latency_ms" : (bounded ?? "latency_ms")];
}

/** Whether the aim is the least cost at an accuracy that must be kept. */
export function aimsAtCost(run) {
  return Number.isFinite(run.study.floor ?? NaN);
}

/** Index of the trial to take, -1 where there is none: the highest score within the budget, or the least cost. */
export function bestOf(run) {
  const { feasible, score, number } = run.columns;
  const [leastCost, cost] = [aimsAtCost(run), priceOf(run)];
  let best = -1;
  for (let i = 0; i < run.count; i++) {
    if (!run.isScored(i) || feasible[i] !== 1) continue;
    const steps = [score[best] - score[i], cost[i] - cost[best], number[i] - number[best]];
    if (leastCost) [steps[0], steps[1]] = [steps[1], steps[0]];
    if (best < 0 || steps.find((step) => step !== 0) < 0) best = i;
  }
  return best;
}

/** Whether a trial costs less than the best of its run and scores within the standard error of it. */
export function tiesWithBest(run, index) {
  const { feasible, score, stderr } = run.columns;
  const { best } = run;
  if (best < 0 || !run.isScored(index) || feasible[index] !== 1 || aimsAtCost(run)) return false;
  const cost = priceOf(run);
  return score[index] >= score[best] - (stderr[best] || 0) && cost[index] < cost[best];
}
