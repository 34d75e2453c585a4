
// What the page says: numbers in words, and differences between two answers of the server.

const RATE_SECONDS = 10; // over which rates are taken
const MINUTE = 60;
const TREND_SECONDS = 120;

const answers = []; // answers of the last TREND_SECONDS, oldest first

/* ---- words and numbers ---- */

const significant = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const coarse = new Intl.NumberFormat("en", { maximumSignificantDigits: 2 });
const grouped = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const percent = (value) => value === null || Number.isNaN(value) ? "–" : `${significant.format(100 * value)} %`;
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
  const power = value < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(value) / 3));
  return `${significant.format(value / 1000 ** power)} ${units[power]}`;
}
const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);
const total = (counts) => sum(Object.values(counts), (count) => count);

/* ---- what the server answers, and differences of it ---- */

const nothing = (stats) => ({ ...stats, decode_tokens: 0, dense_tokens: {}, bytes_not_read: 0, layers: [], lost_mass: [] });

/** The answer of about `seconds` before the newest, or the oldest that there is. */
function before(seconds) {
  const newest = answers[answers.length - 1];
  return answers.find((stats) => newest.collected_at - stats.collected_at <= seconds) ?? newest;
}

function perSecond(newer, older, value) {
  const seconds = newer.collected_at - older.collected_at;
  return seconds > 0 ? (value(newer) - value(older)) / seconds : 0;
}

/** Share of rows read, lost mass and tokens of every head of every sparse layer between two answers. */
function cells(newer, older) {
  const earlier = new Map(older.layers.map((head) => [`${head.layer},${head.kv_head}`, head]));
  const result = new Map();
  for (const head of newer.layers) {
    const key = `${head.layer},${head.kv_head}`;
    const old = earlier.get(key) ?? { decode_tokens: 0, dense_tokens: 0, asked_tokens: 0, rows_cached: 0, rows_read: 0, lost_mass_mean: 0 };
    const sparse = (one) => one.decode_tokens - one.dense_tokens - one.asked_tokens;
    const cached = head.rows_cached - old.rows_cached;
    const tokens = sparse(head) - sparse(old);
    result.set(key, {
      tokens,
      rows: cached > 0 ? (head.rows_read - old.rows_read) / cached : null,
      lost: tokens > 0 ? (head.lost_mass_mean * sparse(head) - old.lost_mass_mean * sparse(old)) / tokens : null,
    });
  }
  return result;
}

/** Pairs of token and query head in each bucket of lost mass, over all layers, and their mean. */
function spread(newer, older) {
  const counts = newer.lost_mass_edges.map((_, i) => sum(newer.lost_mass, (one) => one.counts[i]) - sum(older.lost_mass, (one) => one.counts[i]));
  const pairs = sum(counts, (count) => count);
  const lost = sum(newer.lost_mass, (one) => one.sum) - sum(older.lost_mass, (one) => one.sum);
  return { counts, pairs, mean: pairs > 0 ? lost / pairs : null };
}

