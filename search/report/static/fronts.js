// Fronts, their hypervolume, and the trial to take. The same rules as in `tightrope/search/pareto.py`.

import { KIND } from "./data.js";

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

/** Index of the trial to take: of the feasible ones whose score ties with the highest, the cheapest; -1 where there is none. */
export function bestOf(run) {
  const { kind, feasible, score, stderr } = run.columns;
  const free = (run.study.floor ?? null) === null; // else the aim is the least cost
  const price = (free ? Object.keys(run.study.limits ?? {})[0] : null) ?? "latency_ms";
  const able = [];
  for (let i = 0; i < run.count; i++)
    if (kind[i] === KIND.trial && feasible[i] === 1 && Number.isFinite(score[i])) able.push(i);
  if (!able.length) return -1;
  const top = able.reduce((a, b) => (score[b] > score[a] ? b : a));
  const floor = free ? score[top] - (stderr[top] || 0) : -Infinity;
  const costs = run.columns[price];
  const cheaper = (a, b) => costs[b] < costs[a] || (costs[b] === costs[a] && score[b] > score[a]);
  return able.filter((i) => score[i] >= floor).reduce((a, b) => (cheaper(a, b) ? b : a));
}
