//! Parsing, comparing and matching SPIFFE IDs: done for each certificate and each rule.

use bunter_identity::spiffe::{Pattern, SpiffeId};
use criterion::{criterion_group, criterion_main};
use std::hint::black_box;

fn identifiers(criterion: &mut criterion::Criterion) {
    let usual = "spiffe://example.org/ns/production/sa/orders-api";
    let longest = format!("spiffe://example.org/{}", vec!["segment"; 253].join("/"));
    let id = SpiffeId::parse(usual).expect("a valid ID");
    let same = SpiffeId::parse(usual).expect("a valid ID");
    let pattern = Pattern::parse("spiffe://example.org/ns/*/sa/**").expect("a valid pattern");

    criterion.bench_function("spiffe/parse a usual ID", |bencher| {
        bencher.iter(|| SpiffeId::parse(black_box(usual)));
    });
    criterion.bench_function("spiffe/parse one of 2 KB", |bencher| {
        bencher.iter(|| SpiffeId::parse(black_box(&longest)));
    });
    criterion.bench_function("spiffe/refuse a percent-encoded one", |bencher| {
        bencher.iter(|| SpiffeId::parse(black_box("spiffe://example.org/ns/production/sa/orders%2fapi")));
    });
    criterion.bench_function("spiffe/compare equal IDs", |bencher| {
        bencher.iter(|| black_box(&id) == black_box(&same));
    });
    criterion.bench_function("spiffe/match a pattern", |bencher| {
        bencher.iter(|| black_box(&pattern).matches(black_box(&id)));
    });
}

criterion_group! { name = benches; config = bunter_benches::quick(); targets = identifiers }
criterion_main!(benches);
