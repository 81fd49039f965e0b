//! A port begins here: reads the cases, computes the level philox, and stores the results.
//!
//!     rustc --edition 2021 -O port.rs
//!     ./port VECTORS_DIR RESULTS.safetensors
//!
//! The standard library alone. Add each level to `run_case`. A malformed file ends in a panic.
use std::collections::BTreeMap;
use std::{env, fs};

// --- JSON, as far as the kit's files use it ---

#[derive(Debug)]
enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Table(BTreeMap<String, Json>),
}

#[allow(dead_code)] // some are for levels that you add
impl Json {
    fn parse(text: &[u8]) -> Json {
        Reader { text, at: 0 }.value()
    }
    fn table(&self) -> &BTreeMap<String, Json> {
        let Json::Table(t) = self else {
            panic!("expected a table: {self:?}")
        };
        t
    }
    fn get(&self, key: &str) -> &Json {
        self.table().get(key).unwrap_or_else(|| panic!("no {key}"))
    }
    fn list(&self) -> &[Json] {
        let Json::List(l) = self else {
            panic!("expected a list: {self:?}")
        };
        l
    }
    fn text(&self) -> &str {
        let Json::Text(s) = self else {
            panic!("expected a text: {self:?}")
        };
        s
    }
    fn number(&self) -> f64 {
        let Json::Number(x) = self else {
            panic!("expected a number: {self:?}")
        };
        *x
    }
    fn flag(&self) -> bool {
        let Json::Bool(b) = self else {
            panic!("expected true or false: {self:?}")
        };
        *b
    }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn peek(&mut self) -> u8 {
        while self.text[self.at].is_ascii_whitespace() {
            self.at += 1;
        }
        self.text[self.at]
    }
    fn accept(&mut self, expected: u8) -> bool {
        let found = self.peek() == expected;
        self.at += found as usize;
        found
    }
    fn expect(&mut self, expected: u8) {
        assert!(
            self.accept(expected),
            "byte {}: expected {}",
            self.at,
            expected as char
        );
    }
    fn word(&mut self, word: &str, value: Json) -> Json {
        assert!(
            self.text[self.at..].starts_with(word.as_bytes()),
            "byte {}",
            self.at
        );
        self.at += word.len();
        value
    }
    fn value(&mut self) -> Json {
        match self.peek() {
            b'{' => self.table(),
            b'[' => self.list(),
            b'"' => Json::Text(self.string()),
            b'n' => self.word("null", Json::Null),
            b't' => self.word("true", Json::Bool(true)),
            b'f' => self.word("false", Json::Bool(false)),
            _ => self.number(),
        }
    }
    fn table(&mut self) -> Json {
        let mut items = BTreeMap::new();
        self.expect(b'{');
        while !self.accept(b'}') {
            let key = self.string();
            self.expect(b':');
            items.insert(key, self.value());
            self.accept(b',');
        }
        Json::Table(items)
    }
    fn list(&mut self) -> Json {
        let mut items = Vec::new();
        self.expect(b'[');
        while !self.accept(b']') {
            items.push(self.value());
            self.accept(b',');
        }
        Json::List(items)
    }
    fn string(&mut self) -> String {
        self.expect(b'"');
        let start = self.at;
        while self.text[self.at] != b'"' {
            assert!(
                self.text[self.at] != b'\\',
                "the kit's texts have no escapes"
            );
            self.at += 1;
        }
        self.at += 1;
        String::from_utf8(self.text[start..self.at - 1].to_vec()).unwrap()
    }
    fn number(&mut self) -> Json {
        let start = self.at;
        while self.at < self.text.len() && b"+-.0123456789eE".contains(&self.text[self.at]) {
            self.at += 1;
        }
        let digits = std::str::from_utf8(&self.text[start..self.at]).unwrap();
        Json::Number(
            digits
                .parse()
                .unwrap_or_else(|_| panic!("byte {start}: not a number")),
        )
    }
}

// --- Tensors: safetensors files ---

enum Values {
    Real(Vec<f64>),
    Integer(Vec<i64>),
}

struct Tensor {
    shape: Vec<usize>,
    values: Values, // row-major
}

#[allow(dead_code)]
impl Tensor {
    fn integers(&self) -> &[i64] {
        let Values::Integer(v) = &self.values else {
            panic!("expected integers")
        };
        v
    }
    fn reals(&self) -> &[f64] {
        let Values::Real(v) = &self.values else {
            panic!("expected real numbers")
        };
        v
    }
}

type Tensors = BTreeMap<String, Tensor>;

/// Eight bytes of a file.
fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().unwrap())
}

fn read_tensors(path: &str) -> Tensors {
    let data = fs::read(path).expect(path);
    let start = 8 + word(&data[..8]) as usize;
    let mut tensors = Tensors::new();
    for (name, entry) in Json::parse(&data[8..start]).table() {
        if name == "__metadata__" {
            continue;
        }
        let whole = |list: &Json| list.list().iter().map(|n| n.number() as usize).collect();
        let offsets: Vec<usize> = whole(entry.get("data_offsets"));
        let parts = data[start + offsets[0]..start + offsets[1]].chunks_exact(8);
        let values = match entry.get("dtype").text() {
            "F64" => Values::Real(parts.map(|b| f64::from_bits(word(b))).collect()),
            "I64" => Values::Integer(parts.map(|b| word(b) as i64).collect()),
            dtype => panic!("{name}: {dtype} is not known here"),
        };
        tensors.insert(
            name.clone(),
            Tensor {
                shape: whole(entry.get("shape")),
                values,
            },
        );
    }
    tensors
}

fn write_tensors(path: &str, tensors: &Tensors) {
    let (mut header, mut data) = (Vec::new(), Vec::new());
    for (name, tensor) in tensors {
        let from = data.len();
        let dtype = match &tensor.values {
            Values::Real(v) => {
                v.iter().for_each(|x| data.extend(x.to_le_bytes()));
                "F64"
            }
            Values::Integer(v) => {
                v.iter().for_each(|x| data.extend(x.to_le_bytes()));
                "I64"
            }
        };
        let (shape, to) = (&tensor.shape, data.len());
        let entry =
            format!(r#"{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{from},{to}]}}"#);
        header.push(format!(r#""{name}":{entry}"#));
    }
    let mut text = format!("{{{}}}", header.join(","));
    while text.len() % 8 != 0 {
        text.push(' ');
    }
    let length = (text.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], text.as_bytes(), &data[..]].concat()).expect(path);
}

// --- Levels ---

/// Step 1 of docs/conformance.md.
fn philox4x32(counter: &[i64], key: &[i64], rounds: usize) -> [u32; 4] {
    let mut c = [0, 1, 2, 3].map(|i| counter[i] as u32);
    let mut k = [0, 1].map(|i| key[i] as u32);
    for _ in 0..rounds {
        let (p, q) = (0xD2511F53 * c[0] as u64, 0xCD9E8D57 * c[2] as u64);
        c = [
            (q >> 32) as u32 ^ c[1] ^ k[0],
            q as u32,
            (p >> 32) as u32 ^ c[3] ^ k[1],
            p as u32,
        ];
        k = [k[0].wrapping_add(0x9E3779B9), k[1].wrapping_add(0xBB67AE85)];
    }
    c
}

fn philox(parameters: &Json, counter: &Tensor, key: &Tensor) -> Tensor {
    let rounds = parameters.get("rounds").number() as usize;
    let rows = counter.integers().chunks(4).zip(key.integers().chunks(2));
    let words = rows
        .flat_map(|(c, k)| philox4x32(c, k, rounds))
        .map(i64::from);
    Tensor {
        shape: counter.shape.clone(),
        values: Values::Integer(words.collect()),
    }
}

/// The outputs of a case by name; none for a level that is not computed yet.
fn run_case<'a>(
    level: &str,
    parameters: &Json,
    input: &dyn Fn(&str) -> &'a Tensor,
) -> Vec<(&'static str, Tensor)> {
    match level {
        "philox" => vec![("words", philox(parameters, input("counter"), input("key")))],
        _ => vec![],
    }
}

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let (folder, out) = (&arguments[1], &arguments[2]);
    let manifest = Json::parse(&fs::read(format!("{folder}/manifest.json")).expect(folder));
    let tensors = read_tensors(&format!("{folder}/vectors.safetensors"));
    let mut results = Tensors::new();
    for case in manifest.get("cases").list() {
        let input = |name: &str| &tensors[case.get("inputs").get(name).text()];
        for (name, tensor) in run_case(case.get("level").text(), case.get("parameters"), &input) {
            let stored = case.get("outputs").get(name).get("tensor").text();
            results.insert(stored.to_string(), tensor);
        }
    }
    write_tensors(out, &results);
}
