//! Prices and budgets: how much of a budget the gateway is granted at a time. It spends nothing that was not granted. A
//! grant counts as spent until the gateway reports its use.

use std::collections::BTreeMap;

use llm_batch_core::dialect::Api;
use llm_batch_gateway::protocol::{Allowance, Prices, Rates, Spent, Stream};

use crate::client::WINDOW_ROWS;
use crate::error::{Error, Result};

/// Dollars per million tokens, as SQL writes them: numbers that must stay exact.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Price {
    pub input: Option<String>,
    pub output: Option<String>,
    /// For tokens of prompts that the provider had cached.
    pub cached_input: Option<String>,
    /// The surcharge (percent) for a token of a prompt that is written into the provider's cache.
    pub write_surcharge: u64,
    /// The discount (percent) at the tier "flex".
    pub flex_discount: u64,
    /// If both prices are known: picodollars a token, rounded up, with the dearest one for tokens of prompts.
    pub rates: Option<Prices>,
    /// The same of a token of a prompt that is neither cached nor written into the cache, and of a cached one.
    pub input_rate: u64,
    pub cached_rate: u64,
}

impl Price {
    /// Refuses a budget in dollars where nobody knows what anything costs.
    pub fn check(&self, model: &str) -> Result<()> {
        if self.rates.is_some() {
            return Ok(());
        }
        Err(Error::state(format!("model \"{model}\" has no prices"))
            .detail("A budget in dollars needs both input_price and output_price.")
            .hint("Set the prices with llm_batch.alter_model(), or use a budget in tokens: max_tokens."))
    }

    /// Refuses a route that compares prices if nobody knows what a model costs.
    pub fn check_for_route(&self, model: &str) -> Result<()> {
        if self.rates.is_some() {
            return Ok(());
        }
        Err(Error::state(format!("model \"{model}\" has no prices"))
            .detail("The policy \"cheapest\" compares costs and needs both input_price and output_price of each model.")
            .hint("Set the prices with llm_batch.alter_model() (0 if it costs nothing), or use another policy."))
    }

    /// Its prices by what the provider does with a token.
    pub fn by_kind(&self) -> Rates {
        let Some(Prices { output, .. }) = self.rates else { return Rates::UNKNOWN };
        let written_input = self.input_rate.saturating_mul(100 + self.write_surcharge).div_ceil(100);
        Rates { input: self.input_rate, cached_input: self.cached_rate, written_input, output }
    }

    /// The price of the model behind a server of this dialect.
    pub fn through(mut self, api: Api, model: &str) -> Self {
        self.write_surcharge = api.dialect().cache_write_surcharge(model);
        if let Some(rates) = &mut self.rates {
            rates.input = rates.input.saturating_mul(100 + self.write_surcharge).div_ceil(100);
        }
        self
    }

    /// The amount paid, with each token of a prompt at its own price. No cost where the prices are not known.
    pub fn paid(&self, spent: &Spent) -> Allowance {
        let [normal, flex] = spent.by_tier().map(|spent| self.paid_in_full(&spent));
        // Of a picodollar that is left nothing is given away.
        let part = u128::from(flex.cost) * u128::from(100_u64.saturating_sub(self.flex_discount));
        let cost = normal.cost.saturating_add(u64::try_from(part.div_ceil(100)).unwrap_or(u64::MAX));
        Allowance { cost, tokens: normal.tokens + flex.tokens }
    }

    /// The same without a discount.
    fn paid_in_full(&self, spent: &Spent) -> Allowance {
        let rates = self.rates.unwrap_or_default();
        let cached = spent.cached_input_tokens.min(spent.input_tokens);
        let plain = (spent.input_tokens - cached).saturating_sub(spent.written_input_tokens);
        let mut paid = taken(spent, rates);
        for (tokens, rate) in [(cached, self.cached_rate), (plain, self.input_rate)] {
            paid.cost -= rates.input.saturating_sub(rate).saturating_mul(tokens).min(paid.cost);
        }
        paid
    }
}

/// The spending on each of a stream's models, by its place there, and the rows that it answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bill(BTreeMap<usize, (Spent, u64)>);

impl Bill {
    pub fn add(&mut self, model: usize, spent: &Spent, rows: u64) {
        if *spent != Spent::default() || rows > 0 {
            let (all, answered) = self.0.entry(model).or_default();
            all.add(spent);
            *answered += rows;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (usize, &Spent, u64)> {
        self.0.iter().map(|(model, (spent, rows))| (*model, spent, *rows))
    }

    /// All of it together.
    pub fn total(&self) -> Spent {
        self.0.values().fold(Spent::default(), |mut sum, (spent, _)| {
            sum.add(spent);
            sum
        })
    }
}

/// The amount that stands for no limit.
pub const UNLIMITED: u64 = u64::MAX;

/// The state of a budget.
#[derive(Debug, Clone, Copy)]
pub struct Funds {
    /// The amount that can still be granted, `UNLIMITED` where there is no limit.
    pub free: Allowance,
    /// The amount granted, and not known to be spent.
    pub reserved: Allowance,
}

/// The grant that a stream should have at hand when a full request may take so much. It pays for all rows that can be with
/// the gateway, or for two and a half times the requests that can be under way, if that is less. Then no stream waits for a
/// grant. It is not larger, since all of it counts as spent after a crash.
pub fn chunk(full: Allowance, stream: &Stream) -> Allowance {
    let rows = u64::from(stream.task.options.max_rows_per_request.max(1));
    let requests = WINDOW_ROWS as u64 / rows + 1;
    let most = stream.model.max_concurrent_requests.filter(|_| stream.others.is_empty());
    let most = most.map_or(requests, |n| u64::from(n) * 5 / 2);
    let requests = requests.min(most);
    Allowance { cost: full.cost.saturating_mul(requests), tokens: full.tokens.saturating_mul(requests) }
}

impl Funds {
    /// A grant for a stream that can't send its next request, which takes `least`; `None` if the budget does not have it.
    /// It may be nothing: then the stream makes do with what it has. Not twice, or it would ask for ever.
    pub fn grant(&self, least: Allowance, chunk: Allowance, is_again: bool) -> Option<Allowance> {
        let (free, reserved) = (self.free, self.reserved);
        let has = |free: u64, reserved: u64, least: u64| free.saturating_add(reserved) >= least;
        let is_enough = has(free.cost, reserved.cost, least.cost) && has(free.tokens, reserved.tokens, least.tokens);
        let allowance = Allowance {
            cost: part(free.cost, chunk.cost.max(least.cost)),
            tokens: part(free.tokens, chunk.tokens.max(least.tokens)),
        };
        (is_enough && !(is_again && is_nothing(allowance))).then_some(allowance)
    }

    /// More for a stream that has less than half of its chunk left.
    pub fn top_up(&self, chunk: Allowance) -> Option<Allowance> {
        let (free, reserved) = (self.free, self.reserved);
        let is_low = |free: u64, reserved: u64, chunk: u64| free != UNLIMITED && free > 0 && reserved < chunk / 2;
        (is_low(free.cost, reserved.cost, chunk.cost) || is_low(free.tokens, reserved.tokens, chunk.tokens)).then(
            || Allowance {
                cost: part(free.cost, chunk.cost.saturating_sub(reserved.cost)),
                tokens: part(free.tokens, chunk.tokens.saturating_sub(reserved.tokens)),
            },
        )
    }
}

/// Returns true if it adds to nothing that is limited.
pub fn is_nothing(allowance: Allowance) -> bool {
    [allowance.cost, allowance.tokens].iter().all(|n| *n == 0 || *n == UNLIMITED)
}

fn part(free: u64, wanted: u64) -> u64 {
    if free == UNLIMITED { UNLIMITED } else { free.min(wanted) }
}

/// The gateway's charge to an allowance. All tokens of prompts are at the dearest price, since it knows no other.
pub fn taken(spent: &Spent, prices: Prices) -> Allowance {
    let input = spent.input_tokens + spent.unconfirmed_input_tokens;
    let output = spent.output_tokens + spent.unconfirmed_output_tokens;
    Allowance {
        cost: input.saturating_mul(prices.input).saturating_add(output.saturating_mul(prices.output)),
        tokens: input + output,
    }
}

/// The size of a request that is too large for a budget, in words.
pub fn next_request(least: Allowance) -> String {
    let cost = if least.cost == 0 { String::new() } else { format!("{} and ", dollars(least.cost)) };
    format!("the next request may take {cost}{} tokens", least.tokens)
}

/// Dollars as picodollars.
pub fn picodollars(dollars: f64) -> u64 {
    (dollars * 1e12).round().clamp(0.0, 9e18) as u64
}

/// Picodollars as dollars, without zeros at the end.
pub fn dollars(picodollars: u64) -> String {
    let text = format!("${}.{:012}", picodollars / 1_000_000_000_000, picodollars % 1_000_000_000_000);
    let text = text.trim_end_matches('0');
    text.strip_suffix('.').unwrap_or(text).to_owned()
}
