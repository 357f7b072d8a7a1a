// Whether a line can part two classes of points, and the proof where none can.

const cross = (a, b, c) => (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x);

// The corners of the smallest convex shape around the points (Andrew's chain), without points on its edges.
function hull(points) {
  const sorted = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
  const chain = (list) => list.reduce((found, point) => {
    while (found.length > 1 && cross(found.at(-2), found.at(-1), point) <= 0) found.pop();
    return [...found, point];
  }, []);
  const [lower, upper] = [chain(sorted), chain(sorted.toReversed())];
  return sorted.length < 2 ? sorted : [...lower.slice(0, -1), ...upper.slice(0, -1)];
}

// The segments between these points, and each point as one.
const pairs = (points) => points.flatMap((a, n) => points.slice(n).map((b) => [a, b]));

const within = (value, a, b) => Math.min(a, b) <= value && value <= Math.max(a, b);
const isOn = (p, [a, b]) => cross(a, b, p) === 0 && within(p.x, a.x, b.x) && within(p.y, a.y, b.y);

// A point where two segments meet; null where they do not.
function meeting([a, b], [c, d]) {
  const width = (b.x - a.x) * (d.y - c.y) - (b.y - a.y) * (d.x - c.x);
  if (!width) {
    const end = [a, b].find((each) => isOn(each, [c, d])) ?? [c, d].find((each) => isOn(each, [a, b]));
    return end ? { x: end.x, y: end.y, depth: 0 } : null;
  }
  const along = ((c.x - a.x) * (d.y - c.y) - (c.y - a.y) * (d.x - c.x)) / width;
  const other = ((c.x - a.x) * (b.y - a.y) - (c.y - a.y) * (b.x - a.x)) / width;
  if (along < 0 || along > 1 || other < 0 || other > 1) return null;
  return { x: a.x + along * (b.x - a.x), y: a.y + along * (b.y - a.y), depth: Math.min(along, 1 - along, other, 1 - other) };
}

function inside(point, [a, b, c]) {
  const sides = [cross(a, b, point), cross(b, c, point), cross(c, a, point)];
  return sides.every((side) => side >= 0) || sides.every((side) => side <= 0);
}

// A proof that no line parts the points of both signs: { point, segments } or { point, triangle }; null where one does.
export function inseparable(points) {
  const sides = [1, -1].map((sign) => hull(points.filter((point) => point.sign === sign)));
  let best = null;
  for (const one of pairs(sides[0])) {
    for (const other of pairs(sides[1])) {
      const point = meeting(one, other);
      if (point && point.depth > (best?.point.depth ?? -1)) best = { point, segments: [one, other] };
    }
  }
  if (best) return best;
  for (const [corners, others] of [sides, sides.toReversed()]) {
    for (const point of others) {
      const triangles = corners.length < 3 ? [] : corners.slice(2).map((corner, n) => [corners[0], corners[n + 1], corner]);
      const triangle = triangles.find((each) => inside(point, each));
      if (triangle) return { point, triangle };
    }
  }
  return null;
}
